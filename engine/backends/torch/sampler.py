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
FIRST_LOOK: Final = 256


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
        probs = _keep_best(probs, params.top_k, probs.topk(params.top_k).values[-1])
    if params.top_p < 1.0:
        probs = _nucleus(probs, params.top_p)
    return probs


def _nucleus(probs: Tensor, top_p: float) -> Tensor:
    """Keep as many of the best tokens as it takes to reach `top_p` of all probability; at least one."""
    enough = top_p * probs.sum()
    # A few hundred tokens nearly always are enough, and to find them is much faster than to sort all.
    best = probs.topk(min(FIRST_LOOK, len(probs))).values
    if best.sum() < enough:
        best = probs.sort(descending=True).values
    count = max(int((best.cumsum(-1) - best < enough).sum()), 1)
    return _keep_best(probs, count, best[count - 1])


def _keep_best(probs: Tensor, count: int, least: Tensor) -> Tensor:
    """Zero all but the `count` best, of which `least` is the last."""
    better = probs > least
    kept = torch.where(better, probs, 0.0)
    ties = (probs == least).nonzero()[: count - int(better.sum()), 0]
    kept[ties] = least
    return kept


def _last_possible(probs: Tensor) -> int:
    return int(probs.nonzero()[-1])
