"""Logprobs of the model's own distribution: log-softmax of the raw logits in float32, as vLLM gives them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.protocol import TokenLogprobs


@torch.inference_mode()
def token_logprobs(logits: Tensor, ids: Sequence[int], num_top: Sequence[int]) -> list[TokenLogprobs]:
    """Of one token a row.

    Args:
        logits: [n, vocabulary], float32, before any processing.
        ids: n token ids.
        num_top: for each row, how many of the likeliest tokens; ties go to the lower id.

    """
    if not ids:
        return []
    logprobs = torch.log_softmax(logits, -1)
    chosen = logprobs.gather(1, torch.tensor(ids, device=logits.device)[:, None])
    ranks = (logprobs > chosen).sum(1) + 1
    return [
        TokenLogprobs(value, rank, *_top(row, number))
        for value, rank, row, number in zip(chosen[:, 0].tolist(), ranks.tolist(), logprobs, num_top, strict=True)
    ]


def _top(logprobs: Tensor, number: int) -> tuple[list[int], list[float]]:
    if not number:
        return [], []
    least = logprobs.topk(number).values[-1]
    ids = (logprobs >= least).nonzero()[:, 0]
    best = torch.sort(logprobs[ids], descending=True, stable=True)
    return ids[best.indices[:number]].tolist(), best.values[:number].tolist()
