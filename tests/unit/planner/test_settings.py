import pytest

from planner.core.config_optimizer import Objective
from planner.errors import SettingsError
from planner.settings import Settings


def test_defaults_and_types():
    settings = Settings.from_env({"SPOTSERVE_PLANNER_MODEL": "m", "SPOTSERVE_PLANNER_DATA": "", "OTHER": "x"})
    assert settings == Settings(model="m")
    settings = Settings.from_env(
        {
            "SPOTSERVE_PLANNER_MODEL": "m",
            "SPOTSERVE_PLANNER_PIPELINE": "3",
            "SPOTSERVE_PLANNER_OBJECTIVE": "throughput",
            "SPOTSERVE_PLANNER_HEARTBEAT_TIMEOUT_S": "1.5",
            "SPOTSERVE_PLANNER_LOG_LEVEL": "debug",
        }
    )
    assert settings.targets.pipeline == 3
    assert settings.targets.objective is Objective.THROUGHPUT
    assert settings.heartbeat_timeout_s == 1.5
    assert settings.log_level == "DEBUG"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", "a.b"),
        ("model", ""),
        ("data", "0"),
        ("tensor", "two"),
        ("max_batch", "-1"),
        ("objective", "speed"),
        ("heartbeat_timeout_s", "0.1"),
        ("log_level", "loud"),
    ],
)
def test_bad_values_are_named(name, value):
    environ = {"SPOTSERVE_PLANNER_MODEL": "m"} | {f"SPOTSERVE_PLANNER_{name.upper()}": value}
    with pytest.raises(SettingsError) as caught:
        Settings.from_env(environ)
    assert caught.value.field == name


def test_limits_are_off_unless_a_ceiling_is_set():
    assert Settings(model="m").limits is None
    limits = Settings.from_env(
        {
            "SPOTSERVE_PLANNER_MODEL": "m",
            "SPOTSERVE_PLANNER_MAX_SPOT": "5",
            "SPOTSERVE_PLANNER_MIN_SPOT": "1",
            "SPOTSERVE_PLANNER_CANDIDATE_POOL": "1",
            "SPOTSERVE_PLANNER_SPOT_USD_PER_H": "0.5",
        }
    ).limits
    assert limits is not None
    assert (limits.min_spot, limits.max_spot, limits.max_on_demand, limits.candidate_pool) == (1, 5, 0, 1)
    assert limits.spot_usd_per_h == 0.5


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"min_spot": 1}, "min_spot"),
        ({"candidate_pool": 1}, "candidate_pool"),
        ({"max_spot": 1, "min_spot": 2}, "min_spot"),
        ({"max_spot": 1, "max_usd_per_h": 1.0}, "max_usd_per_h"),
        ({"objective": "slo"}, "latency_s"),
        ({"prepare_timeout_s": 0}, "prepare_timeout_s"),
    ],
)
def test_limits_and_goals_that_contradict_themselves_are_named(given, field):
    environ = {f"SPOTSERVE_PLANNER_{name.upper()}": str(value) for name, value in given.items()}
    with pytest.raises(SettingsError) as caught:
        Settings.from_env({"SPOTSERVE_PLANNER_MODEL": "m"} | environ)
    assert caught.value.field == field
