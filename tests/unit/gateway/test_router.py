"""The choice of a pipeline."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.core.prefix_index import PrefixIndex, block_keys
from gateway.core.router import Fate, Need, Router
from gateway.core.service_times import ServiceTimes
from planner.protocol import Retiring
from tests.unit.gateway.plans import pipeline, plan, state


def make(*states, retiring=(), inherits=None):
    router = Router()
    named = [pipeline(s.pipeline, (inherits or {}).get(s.pipeline, ())) for s in states]
    router.observe_plan(plan(1, [p for p in named if p.id not in retiring]))
    for one in states:
        router.observe_state(one, 0.0)
    return router


def test_nothing_without_plan_or_state():
    router = Router()
    router.observe_state(state("a"), 0.0)
    assert router.choose(0.0) is None
    assert "plan" in router.waiting_reason(0.0)
    router.observe_plan(plan(1, [pipeline("a"), pipeline("b")]))
    assert router.choose(0.0) == "a"
    assert "b" in router.waiting_reason(0.0)
    router.observe_plan(plan(2, []))
    assert "too few" in router.waiting_reason(0.0)


@pytest.mark.parametrize(
    "unfit",
    [
        {"ready": False},
        {"draining": True},
        {"free": 0},
        {"deadline_s": 1.9},
    ],
)
def test_unfit_pipelines_get_nothing(unfit):
    assert make(state("a", **unfit), state("b", running=3, free=1)).choose(0.0) == "b"


def test_stale_state_is_not_counted_on():
    router = make(state("a"))
    assert router.choose(3.0) == "a"
    assert router.choose(3.1) is None
    assert router.ready(3.1) == []


def test_least_loaded_then_longest_lived():
    assert make(state("a", running=2, free=2), state("b", running=1, free=3)).choose(0.0) == "b"
    assert make(state("a", deadline_s=30.0), state("b", running=3, free=1)).choose(0.0) == "b"
    assert make(state("a", deadline_s=30.0), state("b", deadline_s=60.0)).choose(0.0) == "b"


def test_own_dispatches_count_until_the_pipeline_has_told_of_them():
    router = make(state("a", free=2), state("b", free=2))
    chosen = []
    for _ in range(4):
        name = router.choose(0.0)
        assert name is not None
        chosen.append(name)
        router.submitting(name)
    assert sorted(chosen) == ["a", "a", "b", "b"]
    assert router.choose(0.0) is None
    router.submitted("a", accepted=True)
    assert router.choose(0.0) is None
    router.observe_state(state("a", running=1, free=1), 0.1)
    assert router.choose(0.1) is None
    router.submitted("a", accepted=True)
    router.observe_state(state("a", running=2, free=2), 0.2)
    assert router.choose(0.2) == "a"


def test_refusing_pipeline_is_left_alone_for_a_while():
    router = make(state("a"), state("b", running=3, free=1))
    router.submitting("a")
    router.submitted("a", accepted=False, blocked_until_s=0.5)
    router.observe_state(state("a"), 0.1)
    assert router.choose(0.1) == "b"
    assert "a" in router.ready(0.1)
    assert router.choose(0.5) == "a"


def test_heir_is_preferred():
    router = make(state("a"), state("b", running=3, free=1), inherits={"b": ["old"]})
    assert router.choose(0.0, heir_of="old") == "b"
    assert router.choose(0.0, heir_of="other") == "a"
    router.observe_state(state("b", running=4, free=0), 0.1)
    assert router.choose(0.1, heir_of="old") == "a"


def test_fates():
    router = make(state("a"), state("b"))
    broken = Retiring(pipeline=pipeline("b"), reason="lost", broken=True)
    handing_back = Retiring(pipeline=pipeline("a"), reason="notice", deadline_s=10.0)
    assert router.observe_plan(plan(2, [pipeline("c")], [handing_back, broken]))
    assert [router.fate(p) for p in "abcd"] == [Fate.RETIRING, Fate.GONE, Fate.SERVING, Fate.GONE]
    assert router.choose(0.0) == "a"
    router.observe_state(state("a"), 8.5)
    assert router.choose(8.5) is None


def test_older_plans_and_states_are_ignored():
    router = make(state("a", epoch=5))
    assert not router.observe_plan(plan(1, []))
    router.observe_state(state("a", ready=False, epoch=4), 0.0)
    assert router.choose(0.0) == "a"


def test_a_pipeline_under_notice_takes_what_fits():
    router = make(state("a", deadline_s=30.0), state("b", running=3, free=1))
    short = router.decide(Need(expected_s=5.0), 0.0)
    assert (short.pipeline, short.remaining_s, short.expected_s) == ("a", 30.0, 5.0)
    assert router.decide(Need(expected_s=20.0), 0.0).pipeline == "b"
    assert router.decide(Need(), 0.0).pipeline == "b"
    router.observe_state(state("b", running=4, free=0), 0.0)
    last = router.decide(Need(expected_s=20.0), 0.0)
    assert (last.pipeline, last.rule) == ("a", "lifetime")


def test_a_cached_prefix_wins_unless_the_load_differs_too_much():
    def caching(name, **fields):
        return msgspec.structs.replace(state(name, **fields), kv_block_tokens=4)

    prompt = list(range(10))
    router = make(caching("a"), caching("b", running=1, free=3))
    router.remember("b", prompt)
    decision = router.decide(Need(prompt_ids=[*prompt, 99]), 0.0)
    assert (decision.pipeline, decision.rule, decision.cached_tokens) == ("b", "prefix", 8)
    assert router.decide(Need(prompt_ids=[5, *prompt]), 0.0).pipeline == "a"
    router.observe_state(caching("b", running=2, free=2), 0.0)
    decision = router.decide(Need(prompt_ids=prompt), 0.0)
    assert (decision.pipeline, decision.rule) == ("a", "load")
    assert decision.attributes() == {
        "route.rule": "load",
        "route.num_candidates": 2,
        "route.load": 0.0,
        "route.cached_tokens": 0,
    }
    # A new pipeline of the same name has an empty cache.
    router.observe_plan(plan(2, [pipeline("a")]))
    router.observe_plan(plan(3, [pipeline("a"), pipeline("b")]))
    router.observe_state(caching("b", epoch=3), 0.0)
    assert router.decide(Need(prompt_ids=prompt), 0.0).cached_tokens == 0


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 1), max_size=12), max_size=12), st.lists(st.integers(0, 1), max_size=12))
def test_prefix_index_against_comparison(sent, asked):
    index = PrefixIndex()
    for ids in sent:
        index.add(block_keys(ids, 2), 1000)
    longest = max((len(common) for ids in sent if (common := common_prefix(ids, asked))), default=0)
    assert index.num_blocks(block_keys(asked, 2)) == longest // 2


def common_prefix(one, other):
    length = next((i for i, (x, y) in enumerate(zip(one, other, strict=False)) if x != y), min(len(one), len(other)))
    return one[: length - length % 2]


def test_prefix_index_forgets_the_least_recently_used():
    index = PrefixIndex()
    index.add([1, 2, 3], 4)
    index.add([4, 5], 4)
    assert (len(index), index.num_blocks([1, 2, 3]), index.num_blocks([4, 5])) == (4, 2, 2)


def test_service_times():
    times = ServiceTimes()
    assert times.expected_output_tokens(100) == 100
    assert times.expected_s(100) is None
    times.first_token(2.0)
    times.ended(11, 1.0)
    assert times.expected_output_tokens(100) == 11
    assert times.expected_output_tokens(5) == 5
    assert times.expected_output_tokens(100, to_the_end=True) == 100
    assert times.expected_s(10) == pytest.approx(3.0)
