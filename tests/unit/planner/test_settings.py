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
