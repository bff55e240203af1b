import math

import pytest

from planner.core.fleet import (
    LOST_SHOWN_S,
    OUTLIVED_S,
    REQUEST_TIMEOUT_S,
    STARTING_TIMEOUT_S,
    TRANSITIONS,
    Fleet,
    Sign,
)
from planner.protocol import InstanceState, Market

R, S, Y, G, L = (
    InstanceState.REQUESTED,
    InstanceState.STARTING,
    InstanceState.READY,
    InstanceState.GRACE,
    InstanceState.LOST,
)
TABLE = {
    #                         R  S  Y  G  L
    Sign.REQUESTED:           (R, S, Y, G, R),
    Sign.LAUNCHED:            (S, S, Y, G, S),
    Sign.ANNOUNCED:           (S, S, Y, G, S),
    Sign.REACHED:             (Y, Y, Y, G, L),
    Sign.NOTICED:             (G, G, G, G, L),
    Sign.CANCELLED:           (R, S, Y, Y, L),
    Sign.CANCELLED_UNREACHED: (R, S, Y, S, L),
    Sign.LOST:                (L, L, L, L, L),
}  # fmt: skip


def test_the_whole_table():
    expected = {
        (before, sign): after for sign, row in TABLE.items() for before, after in zip((R, S, Y, G, L), row, strict=True)
    }
    assert dict(TRANSITIONS) == expected
    assert set(TRANSITIONS) == {(state, sign) for state in InstanceState for sign in Sign}


@pytest.mark.parametrize(
    ("signs", "state"),
    [
        ([Sign.REQUESTED], R),
        ([Sign.REQUESTED, Sign.LAUNCHED, Sign.ANNOUNCED, Sign.REACHED], Y),
        ([Sign.LAUNCHED], S),
        ([Sign.ANNOUNCED, Sign.REACHED], Y),
        ([Sign.ANNOUNCED, Sign.REACHED, Sign.NOTICED], G),
        ([Sign.ANNOUNCED, Sign.REACHED, Sign.NOTICED, Sign.CANCELLED], Y),
        ([Sign.LAUNCHED, Sign.NOTICED, Sign.REACHED], G),
        ([Sign.NOTICED], G),
        ([Sign.ANNOUNCED, Sign.REACHED, Sign.LOST, Sign.NOTICED, Sign.REACHED], L),
        ([Sign.ANNOUNCED, Sign.REACHED, Sign.LOST, Sign.ANNOUNCED], S),
        ([Sign.LOST], None),
        ([Sign.REACHED], None),
        ([Sign.CANCELLED], None),
    ],
)
def test_life_cycle(signs, state):
    fleet = Fleet()
    for sign in signs:
        fleet.apply("i1", sign, 0.0)
    assert (fleet.instances["i1"].state if fleet.instances else None) is state


def test_rejoined_instance_has_no_old_deadline():
    fleet = Fleet()
    fleet.apply("i1", Sign.NOTICED, 0.0)
    fleet.instances["i1"].deadline_s = 5.0
    fleet.apply("i1", Sign.LOST, 5.0)
    fleet.apply("i1", Sign.ANNOUNCED, 6.0, Market.ON_DEMAND)
    assert fleet.instances["i1"].deadline_s is None


@pytest.mark.parametrize(("reached", "state"), [(True, Y), (False, S)])
def test_withdrawn_notice_leads_back_to_where_it_was(reached, state):
    fleet = Fleet()
    fleet.apply("i1", Sign.LAUNCHED, 0.0)
    assert not fleet.withdraw_notice("i1", 0.0), "there is none"
    fleet.apply("i1", Sign.NOTICED, 1.0)
    fleet.instances["i1"].deadline_s = 9.0
    fleet.instances["i1"].reached = reached
    assert fleet.withdraw_notice("i1", 2.0)
    assert not fleet.withdraw_notice("nobody", 2.0)
    assert [one.deadline_s for one in fleet.statuses()] == [None]
    assert [one.state for one in fleet.statuses()] == [state]


def test_what_never_comes_is_overdue_and_what_is_lost_is_forgotten():
    fleet = Fleet()
    fleet.apply("asked", Sign.REQUESTED, 0.0)
    fleet.apply("never", Sign.LAUNCHED, 0.0)
    fleet.apply("taken", Sign.NOTICED, 0.0)
    fleet.instances["taken"].deadline_s = 100.0

    def overdue(now_s):
        assert (fleet.next_wakeup_s() <= now_s) == bool(fleet.overdue(now_s))
        return [instance.id for instance in fleet.overdue(now_s)]

    assert overdue(99.0) == []
    assert overdue(100.0) == ["taken"]
    assert overdue(REQUEST_TIMEOUT_S) == ["asked", "taken"]
    assert overdue(STARTING_TIMEOUT_S) == ["asked", "never", "taken"]
    for name in overdue(STARTING_TIMEOUT_S):
        fleet.apply(name, Sign.LOST, STARTING_TIMEOUT_S)
    assert fleet.next_wakeup_s() == math.inf
    fleet.forget_old(STARTING_TIMEOUT_S + LOST_SHOWN_S)
    assert len(fleet.statuses()) == 3
    fleet.forget_old(STARTING_TIMEOUT_S + LOST_SHOWN_S + 1)
    assert fleet.statuses() == []


def test_a_living_instance_outlives_its_deadline_by_a_while_before_it_is_overdue(make_world):
    world = make_world()
    world.join("i1")
    world.notice("i1", 5.0)
    fleet, deadline_s = world.state.fleet, world.now_s + 5.0
    assert fleet.next_wakeup_s() == deadline_s + OUTLIVED_S
    assert fleet.overdue(deadline_s + OUTLIVED_S - 0.1) == []
    assert [i.id for i in fleet.overdue(deadline_s + OUTLIVED_S)] == ["i1"]
