"""Any sequence of events: what must hold after each one, and that it ends in service.

`World` checks after every event that no timer that is due is left, and of every plan the invariants, that its epoch
grows, that its ranks live, and that what it moves is where it says.
"""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from planner.core.effects import Tick
from planner.errors import PlannerError
from planner.protocol import InstanceStarting, InstanceState, LoadReport, Market, Phase, PreemptionNotice, UnitRange

NAMES = [f"i{number}" for number in range(5)]
KINDS = {
    "join": lambda run, name, seconds: run.join(name),
    "launch": lambda run, name, seconds: run.launch(name),
    "notice": lambda run, name, seconds: run.notice(name, seconds),
    "cancel": lambda run, name, seconds: run.world.cancel(name),
    "kill": lambda run, name, seconds: run.kill(name),
    "restart ranks": lambda run, name, seconds: run.restart_ranks(name),
    "break": lambda run, name, seconds: run.fail(name, Phase.BROKEN),
    "fail": lambda run, name, seconds: run.fail(name, Phase.PREPARE_FAILED),
    "refuse a shape": lambda run, name, seconds: run.refuse(name),
    "be faulty": lambda run, name, seconds: run.world.faulty.add(f"{name}-0"),
    "hang": lambda run, name, seconds: run.hang(name),
    "wait": lambda run, name, seconds: run.world.advance(seconds),
    "tick": lambda run, name, seconds: run.world.send(Tick()),
    "hold messages": lambda run, name, seconds: run.hold(),
    "deliver a message": lambda run, name, seconds: run.deliver(seconds),
    "lose a message": lambda run, name, seconds: run.lose(seconds),
    "prepare": lambda run, name, seconds: run.prepare(),
    "load": lambda run, name, seconds: run.load(seconds),
    "restart planner": lambda run, name, seconds: run.world.restart_planner(),
    "kill while no planner runs": lambda run, name, seconds: run.kill_unseen(name),
    "bad message": lambda run, name, seconds: run.send_nonsense(name),
}


class Run:
    """Carries out events; one that makes no sense now is left out."""

    def __init__(self, world, num_ranks):
        self.world = world
        self.num_ranks = num_ranks

    def join(self, name):
        if name not in self.world.alive:
            self.world.join(name, num_ranks=self.num_ranks, settle=False)

    def launch(self, name):
        if name not in self.world.alive:
            self.world.send(InstanceStarting(instance=name, market=Market.SPOT))

    def notice(self, name, seconds):
        self.world.notice(name, seconds)

    def kill(self, name):
        if name in self.world.alive:
            self.world.kill(name)

    def kill_unseen(self, name):
        if name in self.world.alive:
            self.world.restart_planner(meanwhile=name)

    def restart_ranks(self, name):
        if name in self.world.alive:
            self.world.restart_ranks(name)

    def fail(self, name, phase):
        if self.world.plans and self.world.plan.pipelines:
            pipelines = self.world.plan.pipelines
            pipeline = pipelines[NAMES.index(name) % len(pipelines)]
            self.world.report(pipeline.ranks()[-1], pipeline.id, phase)

    def refuse(self, name):
        shape = [(1, 1), (2, 1), (3, 1), (1, 3), (2, 3)][NAMES.index(name)]
        self.world.refused.add(shape)
        self.world.names_shape = shape[1] == 1

    def hang(self, name):
        self.world.hung.add(f"{name}-0")

    def hold(self):
        self.world.held = self.world.held or []

    def deliver(self, seconds):
        if self.world.held:
            self.world.send(self.world.held.pop(int(seconds) % len(self.world.held)))

    def lose(self, seconds):
        if self.world.held:
            self.world.held.pop(int(seconds) % len(self.world.held))

    def prepare(self):
        if self.world.plans:
            self.world.prepare()

    def load(self, seconds):
        self.world.send(LoadReport(gateway="g", arrivals_per_s=seconds, running=0, waiting=0))

    def send_nonsense(self, name):
        bad = [
            PreemptionNotice(instance=name, deadline_s=float("nan")),
            LoadReport(gateway="g", arrivals_per_s=-1.0, running=0, waiting=0),
        ]
        if name in self.world.alive:
            inventory = self.world.inventory(name)
            inventory.ranks[0].units.append(UnitRange(first_layer=0, last_layer=10**9, first_group=0, last_group=0))
            bad.append(inventory)
        before = self.world.state.status(self.world.now_s)
        for message in bad:
            with pytest.raises(PlannerError):
                self.world.state.handle(message, self.world.now_s)
        assert self.world.state.status(self.world.now_s) == before

    def settle(self):
        """No more trouble: whoever is under notice goes or stays, everybody else works."""
        world = self.world
        world.held, world.does_prepare = None, True
        world.hung.clear()
        world.refused.clear()
        world.faulty.clear()
        self.prepare()
        world.advance(400.0)  # ranks that hung are tried again
        assert not any(i.state is InstanceState.GRACE for i in world.state.status(world.now_s).instances)
        world.advance(20.0)


event = st.tuples(st.sampled_from(sorted(KINDS)), st.sampled_from(NAMES), st.sampled_from([0.0, 0.3, 2.0, 5.0, 30.0]))
pins = st.fixed_dictionaries(
    {
        "data": st.sampled_from([None, 1, 2]),
        "pipeline": st.sampled_from([None, 1, 2, 3]),
        "tensor": st.sampled_from([None, 1, 3]),
    }
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    events=st.lists(event, max_size=16),
    targets=pins,
    num_ranks=st.sampled_from([1, 2]),
    slow=st.booleans(),
    is_advisory=st.sampled_from([False, False, False, True]),
)
def test_any_sequence_of_events_ends_in_service(make_world, make_model, events, targets, num_ranks, slow, is_advisory):
    model = make_model(num_layers=6, max_model_len=256)
    world = make_world(model=model, options={"prepare_timeout_s": 15.0, "is_advisory": is_advisory}, **targets)
    world.does_prepare = not slow
    run = Run(world, num_ranks)
    run.join("i0")
    for kind, name, seconds in events:
        KINDS[kind](run, name, seconds)
    run.settle()
    status = world.state.status(world.now_s)
    assert status.num_failed_decisions == 0
    if world.alive:
        assert world.ids, "there are ranks, and no pipeline"
        assert world.running() == world.ids
        assert world.plan.deadlines == {}
        assert world.state.next_wakeup_s(world.now_s) > world.now_s + 5, "all is settled"
