import statistics

import msgspec
import pytest

from planner.core.devices import DEVICES, device
from planner.core.profile_json import decode_profile
from planner.core.roofline import DecoderShape, relative_errors, roofline_profile
from planner.errors import ProfileError

HEADS = {1024: 16, 2048: 32, 2560: 32, 4096: 32, 6144: 48, 7168: 56}
HIDDEN = {"345M": 1024, "6.7B": 4096, "20B": 6144}
"""Of the older schema, which does not say."""
MAX_MEDIAN_ERROR = 0.25


def opt_shape(name, num_layers, hidden_size):
    """As the artifact's models are built: float32, an MLP of four times the hidden size, no gate."""
    return DecoderShape(
        name=name,
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=HEADS[hidden_size],
        num_kv_heads=HEADS[hidden_size],
        head_dim=hidden_size // HEADS[hidden_size],
        intermediate_size=4 * hidden_size,
        vocab_size=51200,
        dtype="float32",
        num_mlp_matrices=2,
    )


@pytest.fixture
def llama():
    """Llama 3.1 8B."""
    return {
        "model_type": "llama",
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
    }


@pytest.mark.parametrize(("folder", "name"), [("T4-4x", "T4"), ("V100-4x", "V100-16")])
def test_error_against_measured_profiles(spotserve_data, folder, name):
    errors: list[float] = []
    for path in sorted((spotserve_data / "profiles" / folder).glob("*.json")):
        measured = decode_profile(path.read_bytes(), path.name)
        shape = opt_shape(path.stem, measured.num_layers, measured.hidden_size or HIDDEN[path.stem])
        errors += relative_errors(roofline_profile(shape, DEVICES[name]), measured).values()
    sizes = sorted(abs(error) for error in errors)
    median = statistics.median(sizes)
    print(f"{folder}: {len(sizes)} times, median error {median:.1%}, 90 % within {sizes[int(0.9 * len(sizes))]:.1%}")
    assert len(sizes) >= 70
    assert median <= MAX_MEDIAN_ERROR


def test_relative_errors_of_what_both_have():
    shape = opt_shape("x", 24, 1024)
    estimated = roofline_profile(shape, DEVICES["T4"])
    errors = relative_errors(estimated, roofline_profile(shape, DEVICES["V100-16"]))
    assert set(errors.values()) != {0.0}
    assert set(relative_errors(estimated, estimated).values()) == {0.0}
    assert ("decode", 16, 64) in errors


def test_shape_from_config(llama):
    shape = DecoderShape.from_config(llama, "llama.json")
    assert shape.layer_weights == 4096 * (2 * (32 + 8) * 128 + 3 * 14336)
    assert shape.dtype == "bfloat16"
    assert DecoderShape.from_config(llama, "llama.json", "float32").dtype_bytes == 4


def test_shape_of_opt_has_no_gate(llama):
    config = llama | {"model_type": "opt", "ffn_dim": 16384, "num_key_value_heads": None}
    shape = DecoderShape.from_config(config, "opt.json")
    assert shape.layer_weights == 4096 * (4 * 4096 + 2 * 16384)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "hidden_size: is missing"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: 0 is not a positive integer"),
        ({"vocab_size": True}, "vocab_size: True is not a positive integer"),
        ({"torch_dtype": "int8"}, "dtype: 'int8' is none of float32"),
    ],
)
def test_senseless_config_is_named(llama, changes, message):
    with pytest.raises(ProfileError, match=f"profile llama.json: {message}"):
        DecoderShape.from_config(llama | changes, "llama.json")


def test_device_without_the_dtype(llama):
    shape = DecoderShape.from_config(llama, "llama.json")
    with pytest.raises(ProfileError, match="T4 does not compute in bfloat16, only in float32, float16"):
        roofline_profile(shape, DEVICES["T4"])


def test_unknown_device():
    assert device("L4").memory_bytes == 24_000_000_000
    with pytest.raises(ProfileError, match="L5: is none of T4, L4"):
        device("L5")


@pytest.mark.parametrize("name", sorted(DEVICES))
def test_estimates_stay_above_what_physics_allows(llama, name):
    shape = DecoderShape.from_config(llama, "llama.json", "float16")
    gpu = DEVICES[name]
    profile = roofline_profile(shape, gpu)
    assert sorted(profile.degrees) == [1, 2, 4, 8]
    for tensor, times in profile.degrees.items():
        read_ms = shape.layer_weights * 2 / tensor / gpu.memory_bytes_per_s * 1000
        compute_ms = 2 * 512 * shape.layer_weights / tensor / gpu.flops_per_s["float16"] * 1000
        assert times.decode_layer_ms[0] > read_ms
        assert times.prefill_layer_ms[0] > max(read_ms, compute_ms)
        assert times.decode_layer_ms == sorted(times.decode_layer_ms)
        assert times.prefill_layer_ms == sorted(times.prefill_layer_ms)


def test_crossing_instances_costs(llama):
    shape = DecoderShape.from_config(llama, "llama.json", "float16")
    apart = roofline_profile(shape, DEVICES["L4"])
    together = roofline_profile(shape, msgspec.structs.replace(DEVICES["L4"], ranks_per_instance=8))
    assert set(relative_errors(apart, together).values()) != {0.0}
    for (_, tensor, _), error in relative_errors(apart, together).items():
        assert error > 0 if tensor == 8 else error == 0


def test_newer_devices_are_faster(llama):
    shape = DecoderShape.from_config(llama, "llama.json", "float16")
    names = ["T4", "A10G", "A100-40", "A100-80", "H100", "H200"]
    steps_ms = [roofline_profile(shape, DEVICES[name]).degrees[1].decode_layer_ms[0] for name in names]
    assert steps_ms == sorted(steps_ms, reverse=True)
