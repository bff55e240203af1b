"""Options of `up` that go together, and what the planner is told of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deploy.errors import SettingError
from deploy.parts import Commands, planner_program
from deploy.settings import UpSettings


def build(**options: Any) -> UpSettings:
    return UpSettings(state_dir=Path("state"), cache_dir=Path("cache"), **options)


def planner_environment(**options: Any) -> dict[str, str]:
    environment = planner_program(Commands(), build(**options), "nats://n").environment
    return {name.removeprefix("SPOTSERVE_PLANNER_"): value for name, value in environment.items()}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"autoscale": True}, "--max-instances"),
        ({"max_instances": 3}, "--max-instances"),
        ({"autoscale": True, "max_instances": 0}, "--max-instances"),
        ({"max_on_demand": 1}, "--on-demand"),
        ({"autoscale": True, "max_instances": 2, "max_on_demand": 3}, "--on-demand"),
        ({"objective": "slo"}, "--target-latency"),
        ({"target_latency_s": 2.0}, "--target-latency"),
        ({"objective": "slo", "target_latency_s": 0.0}, "--target-latency"),
        ({"objective": "cheap"}, "--objective"),
    ],
)
def test_what_does_not_go_together_is_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(SettingError, match=named):
        build(**options)


def test_the_planner_is_told_of_limits_and_goals() -> None:
    plain = planner_environment()
    assert not any(name.startswith(("MIN_", "MAX_SPOT", "ADVISORY", "LATENCY")) for name in plain)
    told = planner_environment(objective="slo", target_latency_s=2.5, advisory=True, autoscale=True, max_instances=4)
    assert (told["OBJECTIVE"], told["LATENCY_S"], told["ADVISORY"]) == ("slo", "2.5", "True")
    assert (told["MIN_SPOT"], told["MAX_SPOT"], told["MAX_ON_DEMAND"]) == ("1", "4", "0")
    all_on_demand = planner_environment(autoscale=True, max_instances=2, max_on_demand=2)
    assert (all_on_demand["MIN_ON_DEMAND"], all_on_demand["MAX_SPOT"]) == ("1", "0")
