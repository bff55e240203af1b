import pytest

from planner.core.fleet import TRANSITIONS, Fleet, Sign
from planner.protocol import InstanceState, Market


def test_every_sign_has_an_answer_in_every_state():
    assert set(TRANSITIONS) == {(state, sign) for state in InstanceState for sign in Sign}


@pytest.mark.parametrize(
    ("signs", "state"),
    [
        ([Sign.LAUNCHED], InstanceState.STARTING),
        ([Sign.ANNOUNCED, Sign.REACHED], InstanceState.READY),
        ([Sign.ANNOUNCED, Sign.REACHED, Sign.NOTICED], InstanceState.GRACE),
        ([Sign.LAUNCHED, Sign.NOTICED, Sign.REACHED], InstanceState.GRACE),
        ([Sign.ANNOUNCED, Sign.REACHED, Sign.LOST, Sign.NOTICED, Sign.REACHED], InstanceState.LOST),
        ([Sign.ANNOUNCED, Sign.REACHED, Sign.LOST, Sign.ANNOUNCED], InstanceState.STARTING),
    ],
)
def test_life_cycle(signs, state):
    fleet = Fleet()
    for sign in signs:
        fleet.apply("i1", sign, 0.0)
    assert fleet.state_of("i1") is state


def test_unknown_instances_are_not_lost():
    fleet = Fleet()
    assert not fleet.apply("i1", Sign.LOST, 0.0)
    assert fleet.state_of("i1") is None


def test_rejoined_instance_has_no_old_deadline():
    fleet = Fleet()
    fleet.apply("i1", Sign.NOTICED, 0.0)
    fleet.instances["i1"].deadline_s = 5.0
    fleet.apply("i1", Sign.LOST, 5.0)
    fleet.apply("i1", Sign.ANNOUNCED, 6.0, Market.ON_DEMAND)
    assert fleet.instances["i1"].deadline_s is None


def test_old_ones_are_forgotten():
    fleet = Fleet()
    fleet.apply("never", Sign.LAUNCHED, 0.0)
    fleet.apply("taken", Sign.NOTICED, 0.0)
    fleet.instances["taken"].deadline_s = 100.0
    fleet.forget_old(50.0)
    assert {i.state for i in fleet.statuses()} == {InstanceState.STARTING, InstanceState.GRACE}
    fleet.forget_old(101.0)
    assert fleet.state_of("taken") is InstanceState.LOST
    fleet.forget_old(601.0)
    assert fleet.state_of("taken") is None
    assert fleet.state_of("never") is InstanceState.LOST
    fleet.forget_old(700.0)
    assert fleet.statuses() == []
