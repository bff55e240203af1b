import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest.simulator.clock import Clock
from loadtest.simulator.pipelines import Change, Interruption, Limits, Pipeline, Sequence
from loadtest.simulator.scenario import Request


class Times:
    """A step takes 10 ms, 1 ms more for each sequence, and 1 ms for each prompt token."""

    def step_s(self, num_decoding, prefill_tokens, context_tokens):
        return 0.010 + 0.001 * num_decoding + 0.001 * prefill_tokens


class OneStepAtATime(Pipeline):
    def _steps_left(self, now_s, step_s):
        return min(1, super()._steps_left(now_s, step_s))


class World:
    def __init__(self, kind=Pipeline, **limits):
        fields = {"max_batch": 4, "num_kv_blocks": 100, "block_tokens": 4, "max_step_tokens": 16}
        self.clock = Clock()
        self.done: list[Sequence] = []
        self.pipeline = kind(self.clock, "p1", Times(), Limits(**(fields | limits)), self.done.append, lambda: None)
        self.sequences = []

    def request(self, at_s, prompt_tokens, output_tokens):
        request = Request(
            id=len(self.sequences), arrival_s=at_s, prompt_tokens=prompt_tokens, output_tokens=output_tokens
        )
        sequence = Sequence(request)
        self.sequences.append(sequence)
        self.clock.at(at_s, lambda: self.pipeline.submit(sequence))
        return sequence

    def told(self):
        return [
            (s.tokens, s.first_token_s or -1.0, s.last_token_s, s.longest_gap_s, s.tokens_recomputed)
            for s in self.sequences
        ]


def approx(told):
    return [pytest.approx(values, rel=1e-6, abs=1e-9) for values in told]


def test_one_request_alone():
    world = World()
    sequence = world.request(1.0, prompt_tokens=20, output_tokens=5)
    world.clock.run()
    # Two chunks of prefill, 16 and 4 rows; the second one samples; then four steps.
    assert sequence.first_token_s == pytest.approx(1.0 + 0.026 + 0.014)
    assert sequence.last_token_s == pytest.approx(1.040 + 4 * 0.011)
    assert sequence.longest_gap_s == pytest.approx(0.011)
    assert world.done == [sequence]


def test_a_newcomer_waits_for_the_end_of_the_step_only():
    world = World()
    first = world.request(0.0, prompt_tokens=1, output_tokens=100)
    world.request(0.0505, prompt_tokens=1, output_tokens=1)
    world.clock.run()
    # Steps of 11 ms: one runs from 44 to 55 ms, and the newcomer comes with the next one.
    assert world.sequences[1].first_token_s == pytest.approx(0.055 + 0.012)
    assert first.tokens == 100
    assert first.longest_gap_s == pytest.approx(0.012)


def test_prefill_slows_decoding_down():
    world = World()
    first = world.request(0.0, prompt_tokens=1, output_tokens=100)
    world.request(0.1, prompt_tokens=12, output_tokens=1)
    world.clock.run()
    assert first.longest_gap_s == pytest.approx(0.010 + 0.001 + 0.012)


def test_no_more_at_once_than_the_batch_allows():
    world = World(max_batch=2)
    for _ in range(5):
        world.request(0.0, prompt_tokens=4, output_tokens=10)
    most = 0
    while world.clock.next_s() < math.inf:
        world.clock.run(world.clock.next_s())
        most = max(most, len(world.pipeline.running))
    assert most == 2
    assert len(world.done) == 5


def test_the_youngest_gives_way_when_blocks_run_out():
    world = World(num_kv_blocks=7, max_batch=2)
    old = world.request(0.0, prompt_tokens=8, output_tokens=12)
    young = world.request(0.0, prompt_tokens=8, output_tokens=12)
    world.clock.run()
    assert old.tokens_recomputed == 0
    assert young.tokens_recomputed > 0
    assert [s.request.id for s in world.done] == [0, 1]


def test_without_a_deadline_it_stops_after_the_step_in_flight():
    world = World()
    left: list[list[Sequence]] = []
    sequence = world.request(0.0, prompt_tokens=1, output_tokens=100)
    world.clock.at(0.1, lambda: world.pipeline.stop(None, 0.0, 0.0, left.append))
    world.clock.run()
    assert left == [[sequence]]
    assert sequence.last_token_s == pytest.approx(0.11)
    assert (sequence.tokens, sequence.computed) == (10, 10)
    assert world.clock.now_s == pytest.approx(0.11)


def test_with_a_deadline_it_goes_on_as_long_as_that_allows():
    world = World()
    left: list[list[Sequence]] = []
    sequence = world.request(0.0, prompt_tokens=1, output_tokens=100)
    world.clock.at(0.1, lambda: world.pipeline.stop(1.0, 0.2, 0.1, left.append))
    world.clock.run()
    assert left == [[sequence]]
    assert sequence.tokens == math.floor(0.7 / 0.011)
    assert sequence.last_token_s <= 0.7


def test_an_idle_pipeline_stops_at_once():
    world = World()
    left: list[list[Sequence]] = []
    world.pipeline.stop(100.0, 0.0, 0.0, left.append)
    assert left == [[]]
    assert world.pipeline.num_free_slots == 0


def test_what_is_done_before_the_stop_is_not_handed_back():
    world = World()
    left: list[list[Sequence]] = []
    world.request(0.0, prompt_tokens=1, output_tokens=3)
    world.clock.at(0.01, lambda: world.pipeline.stop(1.0, 0.0, 0.0, left.append))
    world.clock.run()
    assert left == [[]]
    assert len(world.done) == 1


def test_a_killed_pipeline_keeps_the_tokens_of_its_ended_steps():
    world = World()
    sequence = world.request(0.0, prompt_tokens=1, output_tokens=100)
    world.clock.run(0.1)
    assert world.pipeline.kill() == [sequence]
    assert sequence.tokens == 9
    assert sequence.last_token_s == pytest.approx(0.099)
    world.clock.run()
    assert sequence.tokens == 9


class Held:
    """KV that can be pulled in a second, or is not worth it."""

    def __init__(self, num_tokens, pull_s=1.0):
        self.num_tokens, self.pull_s, self.instances = num_tokens, pull_s, frozenset({"old"})

    def start(self, target, num_tokens, now_s):
        return None if self.pull_s is None else now_s + self.pull_s


def resume(world, pull, tokens=6):
    sequence = world.request(0.0, prompt_tokens=10, output_tokens=20)
    sequence.tokens, sequence.first_token_s, sequence.last_token_s, sequence.pull = tokens, -1.0, -0.5, pull
    change = Change(-0.5, "test")
    sequence.interrupt(Interruption(change, -0.5))
    return sequence, change


def test_a_sequence_that_pulls_its_kv_goes_on_without_prefill():
    world = World()
    sequence, change = resume(world, Held(15))
    world.clock.run()
    assert sequence.tokens_recomputed == 0
    assert sequence.longest_gap_s == pytest.approx(0.5 + 1.0 + 0.011)
    assert change.pause_s == pytest.approx(0.5 + 1.0 + 0.011)
    assert world.done == [sequence]


def test_a_sequence_that_does_not_pull_computes_prompt_and_tokens_again():
    world = World()
    sequence, change = resume(world, Held(15, pull_s=None))
    world.clock.run()
    assert sequence.tokens_recomputed == change.tokens_recomputed == 15
    assert sequence.longest_gap_s == pytest.approx(0.5 + 0.026)
    assert world.done == [sequence]


def test_a_pull_whose_source_dies_is_computed_instead():
    world = World()
    sequence, _ = resume(world, Held(15))
    world.clock.at(0.5, lambda: world.pipeline.fail_pulls("another"))
    world.clock.at(0.6, lambda: world.pipeline.fail_pulls("old"))
    world.clock.run()
    assert sequence.tokens_recomputed == 15
    assert sequence.longest_gap_s == pytest.approx(0.5 + 0.6 + 0.026)
    assert world.done == [sequence]


def test_interrupted_sequences_go_before_new_ones():
    world = World(max_batch=1)
    world.request(0.0, prompt_tokens=4, output_tokens=50)
    new = world.request(0.1, prompt_tokens=4, output_tokens=5)
    interrupted, _ = resume(world, None)
    world.clock.run()
    assert world.done.index(interrupted) < world.done.index(new)


def test_a_restarted_request_has_no_tokens():
    sequence = Sequence(Request(id=0, arrival_s=0.0, prompt_tokens=5, output_tokens=9), tokens=3, computed=7)
    sequence.first_token_s = 1.0
    sequence.restart()
    assert (sequence.tokens, sequence.computed, sequence.tokens_recomputed) == (0, 0, 7)
    assert sequence.first_token_s is None


REQUESTS = st.lists(
    st.tuples(st.floats(0, 0.5).map(lambda x: round(x, 4)), st.integers(1, 30), st.integers(1, 20)),
    min_size=1,
    max_size=12,
)


@settings(max_examples=100, deadline=None)
@given(
    REQUESTS,
    st.integers(1, 5),
    st.integers(13, 30),
    st.one_of(st.none(), st.tuples(st.floats(0, 0.5), st.floats(0, 1))),
)
def test_many_steps_at_once_are_the_same_as_one_by_one(requests, max_batch, num_kv_blocks, stop):
    """Whatever arrives, is evicted or stopped; and each request has its tokens once."""
    worlds = []
    for kind in (Pipeline, OneStepAtATime):
        world = World(kind, max_batch=max_batch, num_kv_blocks=num_kv_blocks)
        left: list[Sequence] = []
        for index, (at_s, prompt_tokens, output_tokens) in enumerate(sorted(requests)):
            # None comes at the very end of a step: the last bit of a sum would decide.
            world.request(at_s + 1.3e-6 * index, prompt_tokens, output_tokens)
        if stop is not None:
            at_s, notice_s = 0.51 + stop[0], stop[1] + 1.7e-7  # no request comes later
            world.clock.at(at_s, lambda: world.pipeline.stop(at_s + notice_s, 0.05, 0.0, left.extend))  # noqa: B023
        world.clock.run()
        assert {s.request.id for s in world.done} | {s.request.id for s in left} == set(range(len(requests)))
        assert len(world.done) + len(left) == len(requests)
        assert all(s.tokens == s.request.output_tokens for s in world.done)
        worlds.append(world)
    assert worlds[0].told() == approx(worlds[1].told())
