from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.backends.torch import sampler
from engine.backends.torch.sampler import sample
from engine.protocol import SamplingParams

VOCAB = 50
params_strategy = st.builds(
    SamplingParams,
    max_tokens=st.just(99),
    min_tokens=st.integers(0, 3),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 5.0]),
    top_p=st.sampled_from([0.01, 0.5, 0.9, 1.0]),
    top_k=st.sampled_from([0, 1, 5, 60]),
    min_p=st.sampled_from([0.0, 0.1, 1.0]),
    seed=st.integers(0, 2**63 - 1),
    ignore_eos=st.booleans(),
    eos_token_ids=st.just([3, 9999]),
    stop_token_ids=st.lists(st.integers(0, VOCAB - 1), max_size=3),
)


def logits_of(seed: int, rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


@given(params_strategy, st.integers(0, 99), st.integers(0, 3), st.integers(0, 5))
def test_the_token_is_allowed_and_does_not_depend_on_the_batch(params, seed, choice, index):
    logits = logits_of(seed)
    before = logits.clone()
    token = sample(logits, [params], [choice], [index])[0]
    assert torch.equal(logits, before)
    others = [SamplingParams(max_tokens=1, seed=5), SamplingParams(max_tokens=1, temperature=0.0)]
    batch = torch.cat([logits_of(seed + 1), logits, logits_of(seed + 2)])
    assert sample(batch, [others[0], params, others[1]], [0, choice, 1], [7, index, 0])[1] == token
    assert token in allowed(logits[0], params, index)


def allowed(logits: torch.Tensor, params: SamplingParams, index: int) -> set[int]:
    """Straight from the definitions, token by token."""
    scores = logits.double().tolist()
    if index < params.min_tokens:
        for token in params.stop_token_ids + ([] if params.ignore_eos else params.eos_token_ids):
            if token < VOCAB:
                scores[token] = -math.inf
    order = sorted(range(VOCAB), key=lambda token: -scores[token])
    if params.temperature < 1e-5:
        return {order[0]}
    weights = [math.exp((score - max(scores)) / params.temperature) for score in scores]
    kept = [token for token in order if weights[token] >= params.min_p * weights[order[0]] * (1 - 1e-9)]
    kept = kept[: params.top_k] if params.top_k else kept
    nucleus: set[int] = set()
    total, cumulative = sum(weights[token] for token in kept), 0.0
    for token in kept:
        if (cumulative < params.top_p * total * (1 + 1e-9) and weights[token] > 0) or not nucleus:
            nucleus.add(token)
        cumulative += weights[token]
    return nucleus


def test_frequencies_follow_the_distribution():
    logits = torch.tensor([[0.0, math.log(3.0), -50.0, math.log(6.0)]])
    counts = [0] * 4
    for index in range(4000):
        counts[sample(logits, [SamplingParams(max_tokens=1, seed=11)], [0], [index])[0]] += 1
    assert counts[2] == 0
    for token, share in ((0, 0.1), (1, 0.3), (3, 0.6)):
        assert counts[token] / 4000 == pytest.approx(share, abs=0.03)


def test_an_end_is_banned_before_min_tokens_also_when_greedy():
    logits = torch.zeros(1, VOCAB)
    logits[0, 3], logits[0, 8], logits[0, 9] = 9.0, 8.0, 7.0
    params = SamplingParams(max_tokens=9, min_tokens=2, temperature=0.0, eos_token_ids=[3], stop_token_ids=[8])
    assert [sample(logits, [params], [0], [index])[0] for index in range(3)] == [9, 9, 3]


@pytest.mark.parametrize("scale", [0.5, 8.0], ids=["flat", "peaked"])
def test_the_nucleus_is_the_same_whether_a_few_tokens_reach_it_or_not(scale, monkeypatch):
    params = SamplingParams(max_tokens=1, top_p=0.8)
    for seed in range(20):
        probs = torch.softmax(logits_of(seed)[0].double() * scale, -1)
        expected = allowed(logits_of(seed)[0] * scale, params, 0)
        for first_look in (1, 4, VOCAB):
            monkeypatch.setattr(sampler, "FIRST_LOOK", first_look)
            assert set(sampler._filtered(probs, params).nonzero()[:, 0].tolist()) == expected
