from __future__ import annotations

import math

import pytest
import torch

from engine.backends.torch.logprobs import token_logprobs


def test_they_are_the_log_of_the_softmax_with_ranks_and_the_best_first():
    logits = torch.tensor([[math.log(1.0), math.log(3.0), math.log(6.0), -50.0]])
    [one] = token_logprobs(logits, [0], [2])
    assert one.logprob == pytest.approx(math.log(0.1), abs=1e-6)
    assert one.rank == 3
    assert one.top_ids == [2, 1]
    assert one.top_logprobs == pytest.approx([math.log(0.6), math.log(0.3)], abs=1e-6)


def test_a_row_does_not_depend_on_the_batch_and_ties_go_to_the_lower_id():
    logits = torch.randn(9, 4099, generator=torch.Generator().manual_seed(0)).bfloat16().float()  # Full of ties.
    ids = [7 * row for row in range(9)]
    numbers = [0, 1, 20, 5, 20, 0, 3, 20, 100]
    together = token_logprobs(logits, ids, numbers)
    for row, number in enumerate(numbers):
        assert [together[row]] == token_logprobs(logits[row : row + 1], ids[row : row + 1], [number])
        expected = sorted(range(4099), key=lambda token: (-float(logits[row, token]), token))[:number]
        assert together[row].top_ids == expected
        assert together[row].rank == 1 + int((logits[row] > logits[row, ids[row]]).sum())
