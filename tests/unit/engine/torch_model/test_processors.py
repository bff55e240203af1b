from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.backends.torch.processors import History, needs_processing, processed
from engine.backends.torch.sampler import sample
from engine.protocol import SamplingParams

VOCAB = 12
ids = st.integers(0, VOCAB - 1)
params_strategy = st.builds(
    SamplingParams,
    max_tokens=st.just(99),
    min_tokens=st.integers(0, 3),
    presence_penalty=st.sampled_from([0.0, 0.5, -1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.25, -0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.5, 0.5]),
    logit_bias=st.dictionaries(ids, st.sampled_from([-100.0, -3.0, 2.0, 100.0]), max_size=4),
    ignore_eos=st.booleans(),
    eos_token_ids=st.just([3, 9999]),
    stop_token_ids=st.lists(ids, max_size=2),
)


@given(
    params_strategy,
    st.lists(ids, min_size=1, max_size=6),
    st.lists(ids, max_size=6),
    st.none() | st.sets(ids, min_size=1),
    st.integers(0, 99),
)
def test_scores_are_those_of_the_definition(params, prompt, output, allowed, seed):
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    before = logits.clone()
    mask = None if allowed is None else torch.tensor([token in allowed for token in range(VOCAB)])
    history = History([*prompt, *output], len(prompt))
    scores = processed(logits, params, len(output), history, mask)
    assert torch.equal(logits, before)
    expected = by_definition(logits.tolist(), params, prompt, output, allowed)
    assert scores.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)
    if not needs_processing(params, len(output), mask):
        assert torch.equal(scores, logits)
    if allowed is not None:
        greedy = [SamplingParams(max_tokens=1, temperature=0.0)]
        assert sample(logits[None], greedy, [0], [0], [history], [mask])[0] in allowed


def by_definition(logits, params, prompt, output, allowed):
    allowed_ids = set(range(VOCAB)) if allowed is None else allowed
    early = len(output) < params.min_tokens
    ends = set(params.stop_token_ids) if early else set()
    if (early and not params.ignore_eos) or (params.ignore_eos and allowed is not None):
        ends |= set(params.eos_token_ids)
    banned = ends | {token for token, bias in params.logit_bias.items() if bias == -100.0}
    wins = not allowed_ids - banned  # The grammar, over bans and bias.
    scores = []
    for token, logit in enumerate(logits):
        if token not in allowed_ids or (token in banned and not wins):
            scores.append(-math.inf)
            continue
        score = logit if wins else logit + params.logit_bias.get(token, 0.0)
        if token in prompt or token in output:
            score = score / params.repetition_penalty if score > 0 else score * params.repetition_penalty
        score -= params.frequency_penalty * output.count(token) + params.presence_penalty * (token in output)
        scores.append(score)
    return scores


def test_a_bias_of_100_selects_and_of_minus_100_bans_at_any_temperature():
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(1)) * 5
    only = SamplingParams(max_tokens=9, temperature=2.0, logit_bias={4: 100.0})
    never = SamplingParams(max_tokens=9, temperature=50.0, logit_bias=dict.fromkeys(range(VOCAB - 2), -100.0))
    assert {sample(logits, [only], [0], [i])[0] for i in range(50)} == {4}
    assert {sample(logits, [never], [0], [i])[0] for i in range(50)} == {VOCAB - 2, VOCAB - 1}


def test_penalties_of_one_row_leave_the_others_alone():
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(2))
    plain = SamplingParams(max_tokens=9, temperature=0.0)
    punished = SamplingParams(max_tokens=9, temperature=0.0, presence_penalty=2.0, repetition_penalty=9.0)
    best = logits.argmax(-1).tolist()
    histories = [History(list(range(VOCAB)), 1)] * 3
    together = sample(logits, [plain, punished, plain], [0] * 3, [11] * 3, histories)
    assert (together[0], together[2]) == (best[0], best[2])
    assert together[1] == sample(logits[1:2], [punished], [0], [11], histories[:1])[0]
