import pytest

from loadtest.simulator.clock import Clock
from loadtest.simulator.policies.static_batches import (
    BatchingRules,
    BatchServer,
    BatchTimes,
    Job,
    StaticPipeline,
    Stop,
)
from loadtest.simulator.result import Fate
from loadtest.simulator.scenario import Request
from planner.core.paper_mode import PaperConfig
from planner.core.profile import DegreeTimes, Profile

# Two stages of one rank. Batches of any size: 2 layers in each of 2 stages, 100 ms prefill and 10 ms a step each.
PROFILE = Profile(
    name="test",
    num_layers=4,
    degrees={1: DegreeTimes(batch_sizes=[1, 2, 4], decode_layer_ms=[10, 10, 10], prefill_layer_ms=[100, 100, 100])},
    head_batch_sizes=[1, 2, 4],
    head_ms=[0, 0, 0],
)
CONFIG = PaperConfig(
    data=1,
    pipeline=2,
    tensor=1,
    batch=4,
    prefill_micro_batches=1,
    decode_micro_batches=1,
    latency_s=0,
    throughput_per_s=0,
)
PREFILL_S, STEP_S = 0.4, 0.04
OUTPUT = 10
BATCH_S = PREFILL_S + OUTPUT * STEP_S


def requests(*arrivals_s, output_tokens=OUTPUT):
    return [
        Request(id=i, arrival_s=at_s, prompt_tokens=512, output_tokens=output_tokens)
        for i, at_s in enumerate(arrivals_s)
    ]


class Serving:
    def __init__(self, given, rules=None, num_pipelines=1, max_batch=4):
        self.clock = Clock()
        self.stopped = 0
        self.server = BatchServer(self.clock, given, rules or BatchingRules(), self.on_stopped)
        times = BatchTimes(PROFILE, CONFIG, max_batch, corrected=False)
        self.pipelines = [StaticPipeline(times=times, instances=frozenset({str(i)})) for i in range(num_pipelines)]
        for pipeline in self.pipelines:
            self.server.start(pipeline)

    def on_stopped(self):
        self.stopped += 1

    def latencies(self):
        return [pytest.approx(o.latency_s) for o in self.server.outcomes(self.clock.now_s)]

    def run(self, until_s=1000.0):
        self.clock.run(until_s)
        return self


def test_a_batch_takes_its_prefill_and_its_steps():
    serving = Serving(requests(1.0)).run()
    (outcome,) = serving.server.outcomes(1000.0)
    assert outcome.fate is Fate.COMPLETED
    assert outcome.latency_s == pytest.approx(BATCH_S)
    assert outcome.first_token_s == pytest.approx(1.0 + PREFILL_S + STEP_S)
    assert outcome.longest_gap_s == pytest.approx(STEP_S)
    assert outcome.tokens_done == OUTPUT


def test_longer_prompts_take_longer_prefill_and_a_batch_waits_for_its_longest_output():
    given = [
        Request(id=0, arrival_s=0.0, prompt_tokens=1024, output_tokens=5),
        Request(id=1, arrival_s=0.0, prompt_tokens=512, output_tokens=OUTPUT),
        Request(id=2, arrival_s=0.0, prompt_tokens=512, output_tokens=OUTPUT),
    ]
    serving = Serving(given).run()
    # The first goes alone, as it was there first; the two others are a batch.
    first, second, third = serving.server.outcomes(1000.0)
    assert first.ended_s == pytest.approx(2 * PREFILL_S + 5 * STEP_S)
    assert second.ended_s == third.ended_s == pytest.approx(first.ended_s + BATCH_S)
    assert first.tokens_done == 5


def test_batches_are_powers_of_two_in_order_of_arrival():
    serving = Serving(requests(0, 0.1, 0.2, 0.3)).run()
    # 0 runs alone; of 1, 2, 3 that wait then, two are a batch, the last one is the next.
    assert serving.latencies() == [BATCH_S, 2 * BATCH_S - 0.1, 2 * BATCH_S - 0.2, 3 * BATCH_S - 0.3]


def test_requests_go_to_the_pipeline_that_holds_least():
    serving = Serving(requests(0, 0, 0, 0), num_pipelines=2).run()
    ended_s = sorted(o.ended_s for o in serving.server.outcomes(1000.0))
    assert ended_s == pytest.approx([BATCH_S, BATCH_S, 2 * BATCH_S, 2 * BATCH_S])


@pytest.mark.parametrize(("rules", "held"), [({"pool_batches": 1}, 4), ({"pool_batches": 2}, 8)])
def test_a_pipeline_is_sent_no_more_than_its_pool(rules, held):
    serving = Serving(requests(*[0.01 * i for i in range(20)]), BatchingRules(**rules)).run(0.5)
    assert serving.pipelines[0].num_held == held


def test_whole_batches_are_sent_only_to_an_idle_pipeline():
    serving = Serving(requests(*[0.01 * i for i in range(20)]), BatchingRules(whole_batches=True)).run(0.5)
    assert serving.pipelines[0].num_held == 1
    assert len(serving.run(BATCH_S + 0.1).pipelines[0].running) == 4


def test_a_pipeline_that_must_stop_commits_the_steps_that_fit_and_another_goes_on_without_prefill():
    serving = Serving(requests(0.0, 0.0))
    (pipeline,) = serving.pipelines
    serving.run(0.0)
    serving.server.tell_to_stop(pipeline, Stop(by_s=BATCH_S + PREFILL_S + 5.5 * STEP_S, cautious=True))
    serving.run(5.0)
    # The running batch ends; of the next one, which is the second request, four steps fit: five, less one.
    assert serving.stopped == 1
    assert pipeline.stopped_s == pytest.approx(BATCH_S + PREFILL_S + 4 * STEP_S)
    assert [job.step for job in pipeline.interrupted] == [4]
    assert serving.server.remove(pipeline) == []
    successor = StaticPipeline(times=pipeline.times, instances=frozenset())
    serving.server.start(successor, pipeline.interrupted)
    serving.run()
    assert pipeline.stopped_s is not None
    second = serving.server.outcomes(1000.0)[1]
    assert second.ended_s == pytest.approx(5.0 + 6 * STEP_S)
    assert second.tokens_recomputed == 0
    assert second.longest_gap_s == pytest.approx(5.0 + STEP_S - pipeline.stopped_s)


def test_after_an_acquisition_a_pipeline_stops_right_after_the_time():
    serving = Serving(requests(0.0, 0.0))
    (pipeline,) = serving.pipelines
    by_s = BATCH_S + PREFILL_S + 5.5 * STEP_S
    serving.server.tell_to_stop(pipeline, Stop(by_s=by_s, cautious=False))
    serving.run(5.0)
    assert pipeline.stopped_s is not None
    assert by_s < pipeline.stopped_s <= by_s + STEP_S


def test_an_idle_pipeline_serves_until_it_has_no_time_for_a_prefill():
    serving = Serving(requests(0.5))
    (pipeline,) = serving.pipelines
    serving.server.tell_to_stop(pipeline, Stop(by_s=3.0, cautious=True))
    serving.run()
    assert serving.latencies() == [BATCH_S]
    assert pipeline.stopped_s == pytest.approx(3.0 - PREFILL_S)


def test_a_resumed_batch_can_be_cut_again_but_not_in_the_artifact():
    for cut_resumed in (True, False):
        serving = Serving(requests(0.0), BatchingRules(cut_resumed=cut_resumed))
        (pipeline,) = serving.pipelines
        serving.clock.run(0.0)
        job = pipeline.running[0]
        other = StaticPipeline(times=pipeline.times, instances=frozenset())
        other.stop = Stop(by_s=1.0 + 3.5 * STEP_S, cautious=True)
        serving.run(1.0)
        job.step, job.ended_s = 2, None
        serving.server.start(other, [job])
        serving.run(5.0)
        assert (other.interrupted != []) is cut_resumed
        assert job.step == (4 if cut_resumed else OUTPUT)


def test_nothing_that_was_sent_is_lost_when_a_pipeline_is_removed():
    serving = Serving(requests(*[0.01 * i for i in range(12)]))
    (pipeline,) = serving.pipelines
    serving.run(0.2)
    serving.server.tell_to_stop(pipeline, Stop(by_s=0.3, cautious=True))
    serving.run(2.0)
    serving.server.requeue(serving.server.remove(pipeline))
    serving.server.requeue(pipeline.interrupted)
    serving.server.start(StaticPipeline(times=pipeline.times, instances=frozenset()))
    serving.run()
    assert serving.server.num_open == 0
    ended_s = [o.ended_s for o in serving.server.outcomes(1000.0)]
    assert ended_s == sorted(ended_s)


def test_a_restart_counts_what_is_computed_again_but_not_the_tokens_that_were_seen():
    job = Job(requests(0.0)[0])
    job.advance(4, 1.0, STEP_S)
    assert job.restart() == 512 + 4
    job.advance(OUTPUT, 9.0, STEP_S)
    assert job.tokens_made == OUTPUT
    assert job.first_token_s == 1.0
    assert job.longest_gap_s == pytest.approx(9.0 + 4 * STEP_S - (1.0 + 3 * STEP_S))
    assert job.restart() == 512 + OUTPUT
    assert Job(requests(0.0)[0]).restart() == 0
