from pathlib import Path

import pytest

from engine.errors import SettingError
from engine.settings import PREFIX, EngineSettings
from planner.protocol import Market

REQUIRED = {
    PREFIX + "NATS_URL": "nats://127.0.0.1:4222",
    PREFIX + "MODEL": "tiny",
    PREFIX + "MODEL_DIR": "~/models/tiny",
    PREFIX + "INSTANCE": "i0",
}


def test_required_settings_and_defaults() -> None:
    settings = EngineSettings.from_env({**REQUIRED, "PATH": "/bin", "SPOTSERVE_GATEWAY_PORT": "1"})
    assert settings.instance == "i0"
    assert settings.model_dir == Path("~/models/tiny").expanduser()
    assert (settings.market, settings.num_ranks, settings.max_model_len) == (Market.SPOT, 1, None)
    assert settings.rank_id(2) == "i0-2"


def test_every_kind_of_value_is_read() -> None:
    given = {"MARKET": "on_demand", "NUM_RANKS": "3", "DTYPE": "bfloat16", "MAX_MODEL_LEN": "512", "PARKED_KV_S": "1.5"}
    settings = EngineSettings.from_env({**REQUIRED, **{PREFIX + name: value for name, value in given.items()}})
    assert settings.market is Market.ON_DEMAND
    assert (settings.num_ranks, settings.dtype, settings.max_model_len) == (3, "bfloat16", 512)
    assert settings.parked_kv_s == 1.5


def test_an_empty_variable_counts_as_not_set() -> None:
    assert EngineSettings.from_env({**REQUIRED, PREFIX + "NUM_RANKS": ""}).num_ranks == 1


@pytest.mark.parametrize("name", REQUIRED)
def test_a_missing_variable_is_named(name: str) -> None:
    with pytest.raises(SettingError, match=f"{name}: is not set"):
        EngineSettings.from_env({k: v for k, v in REQUIRED.items() if k != name})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NUM_RANKS", "two"),
        ("NUM_RANKS", "0"),
        ("NUM_THREADS", "-1"),
        ("KV_BLOCK_TOKENS", "0"),
        ("MAX_STEP_TOKENS", "0"),
        ("MAX_MODEL_LEN", "0"),
        ("RANK_MEMORY_BYTES", "-5"),
        ("MARKET", "futures"),
        ("DTYPE", "int4"),
        ("DEVICE", "tpu"),
        ("REDUCTION", "slow"),
        ("ARRANGE_MARGIN_S", "-1"),
        ("ARRANGE_MARGIN_S", "nan"),
        ("PARKED_KV_S", "-0.1"),
        ("PARKED_KV_S", "inf"),
        ("LOG_LEVEL", "LOUD"),
        ("INSTANCE", "i.0"),
        ("INSTANCE", "i 0"),
        ("INSTANCE", "i*"),
        ("MODEL", "llama.3"),
    ],
)
def test_a_wrong_value_is_refused_by_name(name: str, value: str) -> None:
    with pytest.raises(SettingError, match=PREFIX + name) as caught:
        EngineSettings.from_env({**REQUIRED, PREFIX + name: value})
    assert caught.value.variable == PREFIX + name


def test_the_choices_are_said() -> None:
    with pytest.raises(SettingError, match="float32, bfloat16, float16"):
        EngineSettings.from_env({**REQUIRED, PREFIX + "DTYPE": "int4"})


def test_the_tensorrt_backend_has_defaults_of_its_own_which_variables_override() -> None:
    settings = EngineSettings.from_env({**REQUIRED, PREFIX + "BACKEND": "tensorrt_llm"})
    assert (settings.dtype, settings.device, settings.kv_block_tokens) == ("bfloat16", "cuda", 32)
    given = {PREFIX + "BACKEND": "tensorrt_llm", PREFIX + "KV_BLOCK_TOKENS": "64", PREFIX + "CUDA_GRAPHS": "false"}
    settings = EngineSettings.from_env({**REQUIRED, **given})
    assert (settings.kv_block_tokens, settings.cuda_graphs) == (64, False)


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("BACKEND", "vllm", "one of torch, tensorrt_llm"),
        ("PROGRESS_TIMEOUT_S", "0", "must be above 0"),
        ("SHUTDOWN_TIMEOUT_S", "-1", "must be at least 0"),
        ("GPU_MEMORY_FRACTION", "1.0", "above 0 and below 1"),
        ("MAX_NUM_TOKENS", "0", "must be at least 1"),
    ],
)
def test_settings_of_the_tensorrt_backend_are_checked(name: str, value: str, problem: str) -> None:
    with pytest.raises(SettingError, match=f"{PREFIX}{name}.*{problem}"):
        EngineSettings.from_env({**REQUIRED, PREFIX + name: value})
