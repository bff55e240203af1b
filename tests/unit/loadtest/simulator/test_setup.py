"""Options become a scenario, or one line that says what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from loadtest.errors import InputError
from loadtest.simulator.models import PRESETS, read_model
from loadtest.simulator.prices import ON_DEMAND_PER_H, list_prices
from loadtest.simulator.setup import TRACES, Options, build, find_trace, lengths_of, numbers
from planner.core.devices import DEVICES
from planner.core.profile_json import encode_profile
from planner.errors import ProfileError

SMALL = Options(model="llama-3.1-8b", device="L4", trace="calm", arrivals="poisson:0.05")


def options(**given: Any) -> Options:
    return msgspec.structs.replace(SMALL, **given)


def test_defaults_need_only_model_and_device():
    setup = build(Options(model="qwen3-8b", device="h100", trace="churn"))
    scenario = setup.scenario
    assert scenario.ranks_per_instance == 8
    assert scenario.memory_bytes == pytest.approx(0.9 * 80e9)
    assert scenario.prices.on_demand_per_h == 55.04
    assert scenario.requests
    sources = {fact.name: fact.source for fact in setup.facts}
    assert sources["arrivals"].startswith("60 %")
    assert "not measured" in sources["step times"]


def test_options_are_used():
    scenario = build(
        options(
            lengths="100,7",
            ranks_per_instance=2,
            memory_gib=20.0,
            max_batch=3,
            notice_s=5.0,
            acquisition_s=9.0,
            prices="1.5,4",
            drain_s=60.0,
            max_model_len=2048,
        )
    ).scenario
    assert {(r.prompt_tokens, r.output_tokens) for r in scenario.requests} == {(100, 7)}
    assert (scenario.ranks_per_instance, scenario.memory_bytes, scenario.max_batch) == (2, 20 * 2**30, 3)
    assert (scenario.notice_s, scenario.acquisition_s, scenario.drain_s) == (5.0, 9.0, 60.0)
    assert (scenario.prices.spot_per_h, scenario.prices.on_demand_per_h) == (1.5, 4.0)
    assert scenario.model.max_model_len == 2048


def test_the_same_seed_gives_the_same_scenario():
    assert build(options(lengths_cv=1.0, seed=3)) == build(options(lengths_cv=1.0, seed=3))
    assert build(options(lengths_cv=1.0, seed=3)).scenario.requests != build(options(seed=4)).scenario.requests


def test_drawn_lengths_vary_around_their_mean():
    requests = build(options(arrivals="poisson:1", lengths_cv=0.5)).scenario.requests
    mean = sum(request.prompt_tokens for request in requests) / len(requests)
    assert mean == pytest.approx(512, rel=0.1)
    assert len({request.prompt_tokens for request in requests}) > 100


@pytest.mark.parametrize(
    ("arrivals", "num"), [("poisson:0.5", 1800), ("gamma:0.5,6", 1800), ("gamma:0.5,0", 1800)], ids=str
)
def test_arrivals_that_are_drawn(arrivals: str, num: int):
    requests = build(options(arrivals=arrivals)).scenario.requests
    assert len(requests) == pytest.approx(num, rel=0.5)
    assert all(0 <= request.arrival_s < 3600 for request in requests)


def test_arrivals_of_files(tmp_path: Path):
    queries, rates = tmp_path / "queries.txt", tmp_path / "rates.csv"
    queries.write_text("0,1.5,512,0\n1,20,512,99\n2,99999,512,99\n")
    rates.write_text("0.5,0,2\n")
    scenario = build(options(arrivals=str(queries), lengths="512,33")).scenario
    assert [(r.arrival_s, r.prompt_tokens, r.output_tokens) for r in scenario.requests] == [
        (1.5, 512, 33),
        (20, 512, 33),
    ]
    by_minute = [int(r.arrival_s // 60) for r in build(options(arrivals=f"rates:{rates}")).scenario.requests]
    assert by_minute.count(1) == 0
    assert by_minute.count(2) > by_minute.count(0) > 0


def test_a_config_json_and_its_directory_are_models(tmp_path: Path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(PRESETS["qwen3-8b"]))
    assert read_model(str(config)).config == read_model("qwen3-8b").config == read_model(str(tmp_path)).config


def test_a_profile_file_takes_the_place_of_the_estimate(tmp_path: Path):
    path = tmp_path / "profile.json"
    estimated = build(SMALL).scenario.profile
    path.write_bytes(encode_profile(msgspec.structs.replace(estimated, name="measured")))
    assert build(options(profile=path)).scenario.profile.name == "measured"


def test_float16_where_the_device_cannot_do_bfloat16():
    facts = {fact.name: fact.value for fact in build(options(device="T4")).facts}
    assert facts["model"] == "llama-3.1-8b, float16"


@pytest.mark.parametrize("name", TRACES)
def test_example_traces_are_good(name: str):
    trace = find_trace(name)
    assert trace.name == name
    assert trace.end_s == 3600


def test_every_device_has_a_price():
    assert {device.instance_type for device in DEVICES.values()} == set(ON_DEMAND_PER_H)
    prices = list_prices("g4dn.12xlarge")
    assert prices is not None
    assert (prices.spot_per_h, prices.on_demand_per_h) == (1.9046, 3.912)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "model": ({"model": "gpt-9"}, "gpt-9: model: neither a preset (llama-3.1-8b,"),
    "device": ({"device": "T5"}, "--device: 'T5' is not known; there are T4, L4,"),
    "trace": ({"trace": "nowhere.csv"}, "--trace: 'nowhere.csv' is neither a file nor one of calm, churn,"),
    "kind of arrivals": ({"arrivals": "bursty:3"}, "--arrivals: 'bursty' is not known; there are poisson, gamma,"),
    "arrivals file": ({"arrivals": "no.txt"}, "--arrivals: 'no.txt' is none of poisson:RATE,"),
    "negative rate": ({"arrivals": "poisson:-1"}, "--arrivals: '-1' has a number that is negative"),
    "number of numbers": ({"arrivals": "gamma:2"}, "--arrivals: '2' is not RATE,CV"),
    "no arrivals": ({"arrivals": "poisson:0"}, "--arrivals: no request arrives in the 3600 s"),
    "lengths": ({"lengths": "512"}, "--lengths: '512' is not PROMPT,OUTPUT"),
    "length 0": ({"lengths": "512,0"}, "--lengths: '512,0': lengths are whole numbers of tokens from 1"),
    "prices": ({"prices": "cheap,2"}, "--prices: 'cheap,2' is not SPOT,ON_DEMAND"),
    "negative price": ({"prices": "-1,2"}, "--prices: '-1,2' has a number that is negative"),
    "dtype": ({"dtype": "int3"}, "--dtype: 'int3': L4 does float32, float16, bfloat16"),
    "length of the model": ({"max_model_len": 500}, "--max-model-len: 500 tokens: requests have up to 640"),
    "more than the model can": ({"lengths": "200000,1"}, "and llama-3.1-8b can do 131072"),
    "profile": ({"profile": Path("none.json")}, "--profile: none.json: No such file"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options_are_one_clear_line(name: str):
    given, message = BAD[name]
    with pytest.raises(InputError) as error:
        build(options(**given))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("time_s,event,instance,market\n0,add,a,spot\n5,remove,b,\n9,end,,\n", "line 3: instance: 'b' is removed"),
        ("time_s,event,instance,market\n5,add,a,spot\n1,remove,a,\n9,end,,\n", "line 3: time_s: time goes back"),
        ("time_s,event,instance,market\n0,add,a,free\n9,end,,\n", "line 2: market: unknown market 'free'"),
    ],
    ids=["never added", "time goes back", "market"],
)
def test_a_bad_trace_names_file_line_and_field(tmp_path: Path, text: str, message: str):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        build(options(trace=str(path)))
    assert f"{path}, {message}" in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"degrees": {}}, "degrees: no tensor degree"),
        ({"num_layers": "many"}, "num_layers"),
        ({"num_layers": 7}, "num_layers: 7, but "),
        (None, "line 1, column 2: is not JSON"),
    ],
    ids=["no degree", "type", "of another model", "not JSON"],
)
def test_a_bad_profile_names_file_and_field(tmp_path: Path, change: dict[str, Any] | None, message: str):
    path = tmp_path / "bad.json"
    good = json.loads(encode_profile(build(SMALL).scenario.profile))
    path.write_text("{" if change is None else json.dumps(good | change))
    with pytest.raises(ProfileError) as error:
        build(options(profile=path))
    assert str(path) in str(error.value)
    assert message in str(error.value)


def test_numbers_and_lengths():
    assert numbers("1,2.5", "--x", "A,B") == [1.0, 2.5]
    with pytest.raises(InputError, match="--x: 'nan' has a number"):
        numbers("nan", "--x", "A")
    assert lengths_of("100,10", 0.0)[2] == 110
    assert lengths_of("100,10", 1.0)[2] == 550
