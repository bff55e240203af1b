"""The next token from logits. A row's token depends on its logits, parameters, history, mask and (seed, choice) only.

Order, as in vLLM: see `processors.py`; then temperature, min_p, top_k, top_p, and the draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from engine.backends.torch.processors import History, needs_processing, processed
from engine.core.sampling import uniform
from engine.protocol import SamplingParams

GREEDY_BELOW: Final = 1e-5


@torch.inference_mode()
def sample(
    logits: Tensor,
    params: Sequence[SamplingParams],
    choices: Sequence[int],
    indices: Sequence[int],
    histories: Sequence[History] | None = None,
    masks: Sequence[Tensor | None] | None = None,
) -> list[int]:
    """One token id a row.

    Args:
        logits: [n, vocabulary], float32; left as it is.
        params: n sampling parameters.
        choices: n choice numbers.
        indices: n indices of the token to draw (0 = the choice's first generated token).
        histories: n histories, for the penalties; None: there are none.
        masks: n masks, bool [vocabulary] on the device of the logits, of the tokens that the grammar allows, or None.

    """
    greedy = logits.argmax(-1).tolist()
    histories = histories or [History([], 0)] * len(params)
    masks = masks or [None] * len(params)
    tokens: list[int] = []
    for row, (own, choice, index) in enumerate(zip(params, choices, indices, strict=True)):
        changes = needs_processing(own, index, masks[row])
        if own.temperature < GREEDY_BELOW and not changes:
            tokens.append(greedy[row])
            continue
        scores = processed(logits[row], own, index, histories[row], masks[row]) if changes else logits[row]
        tokens.append(_choose(scores, own, choice, index))
    return tokens


def _choose(scores: Tensor, params: SamplingParams, choice: int, index: int) -> int:
    if params.temperature < GREEDY_BELOW:
        return int(scores.argmax())
    # On the CPU and in float64: the draw is then the same on every device for the same logits.
    probs = _filtered(torch.softmax(scores.cpu().double() / params.temperature, -1), params)
    cumulative = probs.cumsum(-1)
    point = uniform(params.seed, choice, index) * cumulative[-1]
    # The first token whose cumulative probability exceeds the point; never one without probability.
    return min(int(torch.searchsorted(cumulative, point, right=True)), _last_possible(probs))


def _filtered(probs: Tensor, params: SamplingParams) -> Tensor:
    """Zero what min_p, then top_k, then top_p rule out; the best token stays. Ties go to the lower id."""
    if params.min_p > 0.0:
        probs = torch.where(probs >= params.min_p * probs.max(), probs, 0.0)
    if 0 < params.top_k < len(probs):
        probs = _keep_best(probs, params.top_k)
    if params.top_p < 1.0:
        ordered = torch.sort(probs, descending=True, stable=True).values
        before = ordered.cumsum(-1) - ordered
        num_kept = int((before < params.top_p * ordered.sum()).sum())
        probs = _keep_best(probs, max(num_kept, 1))
    return probs


def _keep_best(probs: Tensor, count: int) -> Tensor:
    best = torch.sort(probs, descending=True, stable=True).indices[:count]
    kept = torch.zeros_like(probs)
    kept[best] = probs[best]
    return kept


def _last_possible(probs: Tensor) -> int:
    return int(probs.nonzero()[-1])
