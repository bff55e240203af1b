import math

import msgspec
import pytest

from planner.core.hysteresis import FREE, Move, is_worth
from planner.core.layout import Layout, Score

MOVE = Move(pause_s=2.0, prepare_s=10.0, bytes_moved=0, num_sequences=4.0, stopped_share=1.0)


def score(latency_s, throughput_per_s=10.0, service_s=None):
    return Score(
        layout=Layout.of([(1, 1)]),
        throughput_per_s=throughput_per_s,
        latency_s=latency_s,
        service_s=service_s if service_s is not None else latency_s,
    )


@pytest.mark.parametrize(
    ("calm_s", "arrivals_per_s", "move", "expected"),
    [
        # Gains 0.2 s a request over calm - 12 s; costs 4 * 2 s and half of 2 s * 2 s of the arrivals.
        (300.0, 1.0, {}, True),
        (50.0, 1.0, {}, False),
        (11.0, 1.0, {}, False),
        (300.0, 0.01, {}, False),
        (300.0, 0.01, {"num_sequences": 0.0, "stopped_share": 0.0}, True),
        (300.0, 1.0, {"pause_s": 30.0}, False),
        (300.0, 1.0, {"prepare_s": 280.0}, False),
        (300.0, 0.0, {}, False),
        (300.0, 0.0, {"num_sequences": 0.0}, True),
    ],
)
def test_a_change_must_repay_its_pause(calm_s, arrivals_per_s, move, expected):
    move = msgspec.structs.replace(MOVE, **move)
    assert is_worth(score(0.8), score(1.0), move, arrivals_per_s, calm_s)[0] is expected


def test_the_break_even_is_where_gain_and_loss_are_equal():
    loss = 4 * 2.0 + 1.0 * 2.0**2 / 2
    break_even_s = 12.0 + loss / 0.2
    assert not is_worth(score(0.8), score(1.0), MOVE, 1.0, break_even_s - 0.1)[0]
    is_worth_it, why = is_worth(score(0.8), score(1.0), MOVE, 1.0, break_even_s + 0.1)
    assert is_worth_it
    assert "costs 10.0 request-seconds" in why


def test_a_small_gain_may_be_none():
    assert is_worth(score(0.95), score(1.0), FREE, 1.0, 1e6) == (
        False,
        "better than the present layout by less than 10%: not worth a change",
    )


def test_overload_is_worth_a_pause():
    stay, new = score(math.inf, throughput_per_s=1.0, service_s=1.0), score(1.5, throughput_per_s=2.0, service_s=1.5)
    # Half a request more each second that would wait for half of 288 s, though each is served half a second later.
    assert is_worth(new, stay, MOVE, 1.5, 300.0)[0]
    assert not is_worth(new, stay, MOVE, 1.5, 13.0)[0]


def test_throughput_that_nobody_asks_for_is_worth_nothing_unless_it_is_the_objective():
    stay, new = score(1.0, throughput_per_s=1.0), score(1.0, throughput_per_s=2.0)
    assert is_worth(new, stay, MOVE, 0.5, 300.0) == (
        False,
        "better, but not for the present load: not worth a change",
    )
    assert is_worth(new, stay, MOVE, 0.5, 300.0, throughput_only=True)[0]
    # 1 request a second more for 1 s, against 2 s of 1 request a second.
    assert not is_worth(new, stay, MOVE, 0.5, 13.0, throughput_only=True)[0]


def test_while_a_queue_waits_throughput_counts_and_not_time_in_service():
    deeper = score(math.inf, throughput_per_s=1.5, service_s=60.0)
    present = score(math.inf, throughput_per_s=1.0, service_s=20.0)
    assert is_worth(deeper, present, FREE, 0.5, 60.0, num_waiting=100)[0]
    assert not is_worth(present, deeper, FREE, 0.5, 60.0, num_waiting=100)[0]


def test_a_queue_that_is_gone_soon_repays_little():
    slow, fast = score(math.inf, throughput_per_s=1.0), score(math.inf, throughput_per_s=1.5)
    # A queue of 2 at 1 request/s is gone after 2 s: 2 request-seconds, of which 2/3 s are saved.
    assert is_worth(fast, slow, msgspec.structs.replace(FREE, pause_s=0.5, num_sequences=1.0), 0.0, 60, num_waiting=2)[
        0
    ]
    assert not is_worth(
        fast, slow, msgspec.structs.replace(FREE, pause_s=0.7, num_sequences=1.0), 0, 60, num_waiting=2
    )[0]
