"""From a step's logits to what the scheduler commits: tokens, logprobs, and which sequences cannot go on."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.backends.torch.grammar import GrammarMasks
from engine.backends.torch.logprobs import token_logprobs
from engine.backends.torch.processors import History
from engine.backends.torch.sampler import sample
from engine.core.scheduler import SequenceKey, Step, StepExtras, StepSlice
from engine.errors import GrammarError
from engine.protocol import TokenLogprobs


@dataclass(slots=True)
class Masks:
    """What the grammars of a step's sequences allow."""

    by_sequence: dict[SequenceKey, Tensor] = field(default_factory=dict)
    errors: dict[SequenceKey, str] = field(default_factory=dict)


class StepSampler:
    def __init__(self, grammars: GrammarMasks) -> None:
        self._grammars = grammars

    def masks(self, step: Step) -> Masks:
        """To be made while the stages compute: a sequence's mask depends on what was committed before the step."""
        masks = Masks()
        for part in step.slices:
            if part.samples and part.sampling.grammar is not None and part.sampling.max_tokens:
                try:
                    masks.by_sequence[part.key] = self._grammars.mask(part)
                except GrammarError as error:
                    masks.errors[part.key] = f"sampling.grammar: {error}"
        return masks

    def sample(self, step: Step, logits: Tensor, masks: Masks) -> tuple[list[int], StepExtras]:
        """One token for each slice that samples.

        Args:
            step: that has run.
            logits: [rows of all slices' `num_logits`, vocabulary], float32.
            masks: of this step.

        """
        parts = [part for part in step.slices if part.samples]
        all_parts_sample = len(logits) == len(parts)
        sampled = logits if all_parts_sample else logits[_last_rows(step, logits.device)]
        tokens = sample(
            sampled,
            [part.sampling for part in parts],
            [part.key.choice for part in parts],
            [part.index for part in parts],
            [History(part.tokens, part.num_prompt_tokens) for part in parts],
            [masks.by_sequence.get(part.key) for part in parts],
        )
        extras = StepExtras(_logprobs(parts, sampled, tokens), {}, masks.errors)
        if not all_parts_sample:
            extras.prompt_logprobs.update(_prompt_logprobs(step, logits))
        return tokens, extras


def _last_rows(step: Step, device: torch.device) -> Tensor:
    """The logits' row of each slice that samples."""
    rows, end = [], 0
    for part in step.slices:
        end += part.num_logits
        if part.samples:
            rows.append(end - 1)
    return torch.tensor(rows, dtype=torch.long, device=device)


def _logprobs(parts: list[StepSlice], logits: Tensor, tokens: list[int]) -> dict[SequenceKey, TokenLogprobs]:
    wanted = [row for row, part in enumerate(parts) if part.sampling.logprobs is not None]
    if not wanted:
        return {}
    values = token_logprobs(
        logits if len(wanted) == len(parts) else logits[wanted],
        [tokens[row] for row in wanted],
        [parts[row].sampling.logprobs or 0 for row in wanted],
    )
    return {parts[row].key: value for row, value in zip(wanted, values, strict=True)}


def _prompt_logprobs(step: Step, logits: Tensor) -> dict[SequenceKey, list[TokenLogprobs]]:
    scored, start = {}, 0
    for part in step.slices:
        ids = part.scored_ids
        if ids:
            num_top = part.sampling.prompt_logprobs or 0
            scored[part.key] = token_logprobs(logits[start : start + len(ids)], ids, [num_top] * len(ids))
        start += part.num_logits
    return scored
