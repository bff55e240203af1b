import pytest

from loadtest.simulator.metrics import Percentiles, percentiles, summarize
from loadtest.simulator.result import Fate, Outcome, Pause, Result


def known(found: Percentiles | None) -> Percentiles:
    assert found is not None
    return found


def outcome(number, latency_s, fate=Fate.COMPLETED, **changes):
    fields = {
        "first_token_s": float(number) + 0.5,
        "tokens_done": 40,
        "longest_gap_s": 0.2,
        "tokens_recomputed": 3,
    }
    return Outcome(
        id=number,
        fate=fate,
        arrival_s=float(number),
        ended_s=number + latency_s,
        prompt_tokens=60,
        **(fields | changes),
    )


@pytest.fixture
def scenario(make_scenario, make_requests):
    return make_scenario(requests=make_requests(4, 1.0))


@pytest.fixture
def result(scenario):
    return Result(
        policy="ours",
        scenario=scenario.name,
        outcomes=(
            outcome(0, 2.0),
            outcome(1, 4.0),
            outcome(2, 10.0, Fate.UNFINISHED, tokens_done=20),
            outcome(3, 1.0, Fate.LOST, first_token_s=None, tokens_done=0, longest_gap_s=0.0),
        ),
        fleet=(),
        pauses=(
            Pause(at_s=1.0, cause="a", pause_s=2.0, moved_bytes=10),
            Pause(at_s=2.0, cause="b", pause_s=0.0, moved_bytes=5),
            Pause(at_s=3.0, cause="c", pause_s=1.0, tokens_recomputed=7),
        ),
        cost_usd=2.0,
        instance_hours_spot=2.0,
        instance_hours_on_demand=0.0,
        end_s=60.0,
    )


def test_every_request_counts(result, scenario):
    summary = summarize(result, scenario)
    assert (summary.num_completed, summary.num_unfinished, summary.num_lost) == (2, 1, 1)
    assert known(summary.latency).mean == pytest.approx(17 / 4)
    assert known(summary.latency).p99 == 10.0
    assert summary.oldest_unfinished_s == 10.0


def test_the_artifact_counts_what_is_completed(result, scenario):
    summary = summarize(result, scenario)
    assert (known(summary.completed_latency).mean, known(summary.completed_latency).p50) == (3.0, 4.0)


def test_tokens(result, scenario):
    summary = summarize(result, scenario)
    assert known(summary.ttft).mean == pytest.approx(0.5)
    assert known(summary.token_gap).p99 == pytest.approx(3.5 / 39)
    assert known(summary.longest_gap).p99 == 0.2
    assert summary.tokens_recomputed == 12


def test_costs(result, scenario):
    summary = summarize(result, scenario)
    assert summary.usd == 2.0
    assert summary.usd_per_output_token == pytest.approx(2 / 100)
    assert summary.usd_per_token == pytest.approx(2 / 200)
    assert summary.usd_per_completed == 1.0


def test_pauses(result, scenario):
    summary = summarize(result, scenario)
    assert (summary.num_pauses, summary.mean_pause_s, summary.longest_pause_s) == (2, 1.5, 2.0)
    assert summary.moved_bytes == 15


def test_where_nothing_was_completed_there_are_no_costs_of_it(make_scenario, make_requests):
    scenario = make_scenario(requests=make_requests(1, 1.0))
    nothing = Result(
        policy="none",
        scenario=scenario.name,
        outcomes=(outcome(0, 5.0, Fate.UNFINISHED, first_token_s=None, tokens_done=0),),
        fleet=(),
        pauses=(),
        cost_usd=1.0,
        instance_hours_spot=1.0,
        instance_hours_on_demand=0.0,
        end_s=5.0,
    )
    summary = summarize(nothing, scenario)
    assert (summary.usd_per_output_token, summary.usd_per_token, summary.usd_per_completed) == (None, None, None)
    assert (summary.completed_latency, summary.ttft, summary.token_gap) == (None, None, None)
    assert known(summary.latency).p99 == 5.0


def test_percentiles_are_those_of_the_artifact():
    values = [float(value) for value in range(200)]
    found = known(percentiles(list(reversed(values))))
    assert (found.p50, found.p90, found.p95, found.p96, found.p97, found.p98, found.p99) == (
        100.0,
        180.0,
        190.0,
        192.0,
        194.0,
        196.0,
        198.0,
    )
    assert found.mean == 99.5
    assert known(percentiles([7.0])).p99 == 7.0
    assert percentiles([]) is None


def test_a_result_of_another_scenario_is_refused(result, scenario, make_requests, make_scenario):
    with pytest.raises(ValueError, match="other"):
        summarize(result, make_scenario(name="other", requests=make_requests(4, 1.0)))
    with pytest.raises(ValueError, match="4 requests"):
        summarize(result, make_scenario(requests=make_requests(5, 1.0)))
