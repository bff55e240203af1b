"""What changes a row's logits before temperature: grammar, min_tokens, logit_bias, penalties, in this order.

Pure functions of the request and the tokens so far, so that a resumed sequence goes on as if it had never stopped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Final, NamedTuple

import torch
from torch import Tensor

from engine.core.sequence import BANNED_BIAS
from engine.protocol import SamplingParams

MINUS_INFINITY: Final = float("-inf")


class History(NamedTuple):
    """The tokens of a sequence: the first `num_prompt` are its prompt, the others its output."""

    tokens: list[int]
    num_prompt: int


def needs_processing(params: SamplingParams, index: int, mask: Tensor | None) -> bool:
    """Whether `processed` would change the logits."""
    return (
        mask is not None
        or index < params.min_tokens
        or bool(params.logit_bias)
        or bool(params.presence_penalty or params.frequency_penalty)
        or params.repetition_penalty != 1.0
    )


def processed(logits: Tensor, params: SamplingParams, index: int, history: History, mask: Tensor | None) -> Tensor:
    """The scores that token `index` is drawn from.

    Args:
        logits: [vocabulary], float32; left as it is.
        params: of the request.
        index: of the token to draw.
        history: for the penalties.
        mask: bool [vocabulary]: what the grammar allows.

    """
    allowed = logits if mask is None else logits.masked_fill(~mask, MINUS_INFINITY)
    scores = allowed.clone()
    banned = {i for i in banned_ids(params, index, has_grammar=mask is not None) if 0 <= i < len(logits)}
    if params.logit_bias:
        scores[_ids(params.logit_bias, scores)] += scores.new_tensor(list(params.logit_bias.values()))
        banned |= {token for token, bias in params.logit_bias.items() if bias <= BANNED_BIAS}
    if banned:
        scores[_ids(banned, scores)] = MINUS_INFINITY
        if bool((scores == MINUS_INFINITY).all()):
            scores = allowed.clone()  # The bans leave nothing that the grammar allows: the grammar wins.
    _penalize(scores, params, history)
    return scores


def banned_ids(params: SamplingParams, index: int, *, has_grammar: bool) -> set[int]:
    """Tokens that would end the choice too early: before `min_tokens`, or with `ignore_eos` before its grammar ends."""
    banned: set[int] = set()
    if index < params.min_tokens:
        banned.update(params.stop_token_ids)
    if has_grammar and params.ignore_eos:
        banned.update(params.eos_token_ids)
    if index < params.min_tokens and not params.ignore_eos:
        banned.update(params.eos_token_ids)
    return banned


def _penalize(scores: Tensor, params: SamplingParams, history: History) -> None:
    if params.repetition_penalty != 1.0 and history.tokens:
        seen = _ids(sorted(set(history.tokens)), scores)
        own = scores[seen]
        scores[seen] = torch.where(own > 0, own / params.repetition_penalty, own * params.repetition_penalty)
    if params.frequency_penalty or params.presence_penalty:
        counts = Counter(history.tokens[history.num_prompt :])
        if counts:
            penalties = [params.presence_penalty + params.frequency_penalty * count for count in counts.values()]
            scores[_ids(counts, scores)] -= scores.new_tensor(penalties)


def _ids(ids: Collection[int], like: Tensor) -> Tensor:
    return torch.tensor(list(ids), dtype=torch.long, device=like.device)
