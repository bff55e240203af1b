"""Settings from the environment."""

import pytest

from gateway.errors import SettingsError
from gateway.settings import Settings

MINIMAL = {"SPOTSERVE_GATEWAY_MODEL_DIR": "/models/m", "SPOTSERVE_GATEWAY_MODEL": "m"}


def test_values_and_defaults():
    environ = {**MINIMAL, "SPOTSERVE_GATEWAY_PORT": "9000", "SPOTSERVE_GATEWAY_DRAIN_S": "2.5", "PORT": "1"}
    settings = Settings.from_env(environ, gateway_id="gw-1")
    assert (settings.port, settings.drain_s, settings.host) == (9000, 2.5, "127.0.0.1")
    assert settings.gateway_id == "gw-1"
    assert Settings.from_env({**MINIMAL, "SPOTSERVE_GATEWAY_GATEWAY_ID": "x"}, gateway_id="y").gateway_id == "x"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "http"),
        ("PORT", "70000"),
        ("MODEL", "a.b"),
        ("MODEL_DIR", ""),
        ("MAX_QUEUE", "0"),
        ("REQUEST_TIMEOUT_S", "-1"),
        ("KEEP_ALIVE_S", "-1"),
        ("GATEWAY_ID", "a b"),
    ],
)
def test_bad_value_names_the_variable(name, value):
    variable = f"SPOTSERVE_GATEWAY_{name}"
    with pytest.raises(SettingsError, match=variable) as caught:
        Settings.from_env({**MINIMAL, variable: value}, gateway_id="gw")
    assert caught.value.variable == variable
