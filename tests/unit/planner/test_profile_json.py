import json

import msgspec
import pytest

from planner.core.profile import DegreeTimes, Profile, divisors
from planner.core.profile_json import decode_profile, encode_profile
from planner.errors import ProfileError


@pytest.fixture
def profile(make_model, make_profile):
    return Profile.from_steps(make_profile(), make_model())


@pytest.fixture
def artifact():
    times = {"bsz-1": {"init": 10.0, "incr": 1.2}, "bsz-2": {"init": 19.0, "incr": 1.3}}
    return {
        "name": "old",
        "layer_num": 12,
        "final_fix_factor": 1.1,
        "pp_init_comm": 2.0,
        "pp_incr_comm": 0.1,
        "embed": [0.3, 0.4],
        "tp-1": times,
        "tp-2": times,
        "tp-4": times,
    }


def changed(content, **changes):
    return json.dumps({key: value for key, value in (content | changes).items() if value is not None}).encode()


def test_our_schema_comes_back(profile):
    assert decode_profile(encode_profile(profile), "file") == profile


def test_artifact_fields(artifact):
    profile = decode_profile(changed(artifact, hidden_size=100, padded_layer_num=16, max_tp=2), "file")
    assert sorted(profile.degrees) == [1, 2]
    assert profile.num_layers == 12
    assert profile.padded_num_layers == 16
    assert profile.degrees[2] == DegreeTimes(
        batch_sizes=[1, 2], decode_layer_ms=[1.2, 1.3], prefill_layer_ms=[10.0, 19.0]
    )
    assert profile.head_ms == [0.6, 0.8]
    # 1.2 ms read 12 h^2 numbers, so 2 h numbers take 1.2 / (6 h).
    assert profile.context_layer_ms_per_token == pytest.approx(1.2 / 600)


def test_artifact_older_schema(artifact):
    profile = decode_profile(changed(artifact), "file")
    assert sorted(profile.degrees) == [1, 2, 4]
    assert profile.padded_num_layers is None
    assert profile.context_layer_ms_per_token == 0.0


def test_artifact_sizes_are_sorted_as_numbers(artifact):
    times = {f"bsz-{size}": {"init": 1.0 * size, "incr": 1.0} for size in (16, 2, 1)}
    assert decode_profile(changed(artifact, **{"tp-1": times}), "file").degrees[1].batch_sizes == [1, 2, 16]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_num": None}, "content: .*missing required field `layer_num`"),
        ({"layer_num": 0}, "num_layers: 0 is not positive"),
        ({"pp_init_comm": "x"}, "pp_init_comm: Expected `float`"),
        ({"embed": []}, "head_ms: batch sizes"),
        ({"tp-1": {"bsz-1": {"init": 1.0}}}, r"tp-1\.bsz-1: .*`incr`"),
        ({"tp-1": {"bsz-1": {"init": 1.0, "incr": "x"}}}, r"tp-1\.bsz-1\.incr: Expected `float`"),
        ({"tp-1": 7}, "tp-1: is not an object"),
        ({"tp-1": {"bsz-1": {"init": 1.0, "incr": -1.0}}}, r"degrees\.1\.decode_layer_ms: -1\.0 ms at batch size 1"),
        ({"tp-1": {"big": {"init": 1.0, "incr": 1.0}}}, r"tp-1\.big: 'big' does not end in a number"),
        ({"tp-x": {}}, "tp-x: 'tp-x' does not end in a number"),
        ({"tp-1": {}}, r"degrees\.1\.decode_layer_ms: batch sizes \[\]"),
        ({"max_tp": 0}, "degrees: no tensor degree"),
    ],
)
def test_artifact_errors_name_file_and_field(artifact, changes, message):
    with pytest.raises(ProfileError, match=f"profile t4.json: {message}"):
        decode_profile(changed(artifact, **changes), "t4.json")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{\n "name": 1,\n "num_layers" 2\n}', "line 3, column 15: is not JSON: Expecting ':'"),
        (b"", "line 1, column 1: is not JSON"),
        (b'{"name": "\xff"}', "byte 10: is not text in UTF-8"),
        (b'{"name": NaN}', "name: Expected `str`"),
        (b"[1]", "content: is not a JSON object"),
        (b"{}", "content: .*missing required field `name`"),
    ],
)
def test_what_is_no_profile(data, message):
    with pytest.raises(ProfileError, match=f"profile mine.json: {message}"):
        decode_profile(data, "mine.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"typo": 1}, "unknown field `typo`"),
        ({"head_ms": [1.0]}, "head_ms: 1 times for 3 batch sizes"),
        ({"head_ms": [1.0, "x", 2.0]}, r"head_ms\[1\]: Expected `float`"),
        ({"degrees": {}}, "degrees: no tensor degree was measured"),
        ({"fix_factor": 0}, "fix_factor: 0.* is not positive"),
        ({"prefill_hop_ms": -1}, "prefill_hop_ms: -1.* is negative"),
        (
            {"degrees": {"0": {"batch_sizes": [1], "decode_layer_ms": [1], "prefill_layer_ms": [1]}}},
            "degrees: 0 is not",
        ),
        (
            {"degrees": {"1": {"batch_sizes": [2, 1], "decode_layer_ms": [1, 1], "prefill_layer_ms": [1, 1]}}},
            r"degrees\.1\.decode_layer_ms: batch sizes \[2, 1\] are not",
        ),
        (
            {"degrees": {"1": {"batch_sizes": [1], "decode_layer_ms": [1], "prefill_layer_ms": [0]}}},
            r"degrees\.1\.prefill_layer_ms: 0.* ms at batch size 1 is not a positive time",
        ),
    ],
)
def test_errors_name_file_and_field(profile, changes, message):
    content = json.loads(encode_profile(profile))
    with pytest.raises(ProfileError, match=rf"profile mine\.json: .*{message}"):
        decode_profile(changed(content, **changes), "mine.json")


def test_all_files_of_the_artifact_can_be_read(spotserve_data):
    paths = sorted((spotserve_data / "profiles").glob("*/*.json"))
    profiles = {path: decode_profile(path.read_bytes(), path.name) for path in paths}
    assert len(profiles) == 14
    degrees = {f"{path.parent.name}/{path.stem}": max(profile.degrees) for path, profile in profiles.items()}
    assert degrees["T4-4x/megatron_h6144_profile"] == 8  # max_tp, although 16 was measured
    assert degrees["T4-1x/megatron_h6144_profile"] == 16
    assert degrees["V100-4x/20B"] == 4


def test_calibration_shares_the_work_and_pays_for_all_reduces(make_model, make_profile):
    profile = Profile.from_steps(make_profile(), make_model())
    assert sorted(profile.degrees) == [1, 3]
    one, three = profile.degrees[1], profile.degrees[3]
    assert one.decode_layer_ms == [0.8, 1.0, 2.0]
    assert three.decode_layer_ms[0] == pytest.approx(0.8 / 3 + 2 * 2 * 1.2)
    assert three.head_ms is not None
    assert three.head_ms[0] == pytest.approx(6.0 / 3 + 2 * 1.2)
    assert one.prefill_layer_ms == pytest.approx([64 * 0.05, 4 * 64 * 0.05, 16 * 64 * 0.05])
    sent_ms = 64 * 2304 / 1e9 * 1000
    assert three.prefill_layer_ms[0] == pytest.approx(64 * 0.05 / 3 + 2 * (2 * 1.2 + 4 / 3 * sent_ms))
    assert profile.prefill_hop_ms == pytest.approx(0.4 + sent_ms)


def test_calibration_that_contradicts_itself(make_model, make_profile):
    senseless: list[dict[str, list[float]]] = [
        {"batch_sizes": []},
        {"decode_head_ms": [1.0]},
        {"decode_layer_ms": [0.0, 1.0, 2.0]},
    ]
    for changes in senseless:
        with pytest.raises(ProfileError, match="profile calibration on cpu: decode_"):
            Profile.from_steps(make_profile(**changes), make_model())
    with pytest.raises(ProfileError, match="transfer_bytes_per_s"):
        Profile.from_steps(make_profile(transfer_bytes_per_s=0.0), make_model())
    with pytest.raises(ProfileError, match="prefill_layer_ms"):
        Profile.from_steps(make_profile(prefill_layer_ms_per_token=0.0), make_model())


def test_calibration_survives_the_wire(make_model, make_profile):
    decoded = msgspec.msgpack.decode(msgspec.msgpack.encode(make_profile()), type=type(make_profile()))
    assert Profile.from_steps(decoded, make_model()) == Profile.from_steps(make_profile(), make_model())


def test_divisors():
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert divisors(1) == [1]
