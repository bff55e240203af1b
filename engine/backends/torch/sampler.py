"""The next token from logits. A row's token depends on its logits, parameters and (seed, choice, index) only."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from engine.core.sampling import uniform
from engine.protocol import SamplingParams

GREEDY_BELOW: Final = 1e-5
MINUS_INFINITY: Final = float("-inf")


@torch.inference_mode()
def sample(logits: Tensor, params: list[SamplingParams], choices: list[int], indices: list[int]) -> list[int]:
    """One token id a row.

    Args:
        logits: [n, vocabulary], float32; left as it is.
        params: n sampling parameters.
        choices: n choice numbers.
        indices: n indices of the token to draw (0 = the choice's first generated token).

    """
    greedy = logits.argmax(-1).tolist()
    tokens: list[int] = []
    for row, (own, choice, index) in enumerate(zip(params, choices, indices, strict=True)):
        banned = _banned(own, index, logits.shape[1])
        if own.temperature < GREEDY_BELOW and not banned:
            tokens.append(greedy[row])
            continue
        scores = logits[row]
        if banned:
            scores = scores.clone()
            scores[banned] = MINUS_INFINITY
        tokens.append(_choose(scores, own, choice, index))
    return tokens


def _banned(params: SamplingParams, index: int, vocab_size: int) -> list[int]:
    """Tokens that would end the choice before `min_tokens`."""
    if index >= params.min_tokens:
        return []
    ending = {*params.stop_token_ids, *(() if params.ignore_eos else params.eos_token_ids)}
    return [token for token in ending if 0 <= token < vocab_size]


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
    """Zero what top_k, then top_p, then min_p rule out; the best token stays. Ties go to the lower id."""
    if 0 < params.top_k < len(probs):
        probs = _keep_best(probs, params.top_k)
    if params.top_p < 1.0:
        ordered = torch.sort(probs, descending=True, stable=True).values
        before = ordered.cumsum(-1) - ordered
        num_kept = int((before < params.top_p * ordered.sum()).sum())
        probs = _keep_best(probs, max(num_kept, 1))
    if params.min_p > 0.0:
        probs = torch.where(probs >= params.min_p * probs.max(), probs, 0.0)
    return probs


def _keep_best(probs: Tensor, count: int) -> Tensor:
    best = torch.sort(probs, descending=True, stable=True).indices[:count]
    kept = torch.zeros_like(probs)
    kept[best] = probs[best]
    return kept


def _last_possible(probs: Tensor) -> int:
    return int(probs.nonzero()[-1])
