"""From the words of a command line to a scenario. Whatever was not given has a default, and the report says which."""

from __future__ import annotations

import math
from importlib.resources import files
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from loadtest.errors import InputError
from loadtest.simulator.arrivals import Fixed, Lengths, LogNormal, gamma, make_requests, per_minute, poisson
from loadtest.simulator.inputs import read_rates, read_requests, read_trace
from loadtest.simulator.models import KV_BLOCK_TOKENS, Model, decoder_shape, read_model
from loadtest.simulator.prices import SOURCE, list_prices
from loadtest.simulator.scenario import CapacityTrace, Prices, Request, Scenario
from loadtest.simulator.what_if import Fit, check_fit, describe_gib, sensible_arrivals_per_s, weights_bytes
from planner.core.cost_model import CostModel, Workload
from planner.core.devices import DEVICES, Device
from planner.core.links import Links
from planner.core.profile import Profile
from planner.core.profile_json import decode_profile
from planner.core.roofline import DTYPE_BYTES, INTER_FRACTION, roofline_profile
from planner.errors import ProfileError
from planner.protocol import ModelShape

USABLE_MEMORY: Final = 0.9
"""Of a device; the rest is for its context and for fragments."""
DISK_BYTES_PER_S: Final = 1e9
"""Assumed: weights from an instance's NVMe disk, or from storage in the same region."""
MAX_MODEL_LEN: Final = 4096
"""Longest sequence, where requests are not longer and the model can do it."""
TRACES: Final = ("calm", "churn", "bad-hour", "on-demand-mix")
"""In loadtest/traces."""


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """As they were given; None: not given."""

    model: str
    device: str
    trace: str
    arrivals: str | None = None
    lengths: str = "512,128"
    lengths_cv: float = 0.0
    profile: Path | None = None
    dtype: str | None = None
    max_model_len: int | None = None
    ranks_per_instance: int | None = None
    memory_gib: float | None = None
    max_batch: int = 16
    notice_s: float = 30.0
    acquisition_s: float = 120.0
    prices: str | None = None
    drain_s: float = math.inf
    seed: int = 0


class Fact(msgspec.Struct, frozen=True, kw_only=True):
    """One line of what a simulation assumes."""

    name: str
    value: str
    source: str


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    scenario: Scenario
    fit: Fit
    facts: list[Fact]


def build(options: Options) -> Setup:
    """Raises InputError, or ProfileError of the planner, for what cannot be used."""
    device, model, trace = device_of(options.device), read_model(options.model), find_trace(options.trace)
    dtype = dtype_of(options.dtype, device)
    ranks_per_instance = options.ranks_per_instance or device.ranks_per_instance
    prompts, outputs, longest = lengths_of(options.lengths, options.lengths_cv)
    mean_prompt, mean_output = numbers(options.lengths, "--lengths", "PROMPT,OUTPUT")
    shape = _shape(model, dtype, options.max_model_len, longest)
    profile = _profile(options.profile, model, dtype, device, int(mean_prompt))
    memory_bytes = int(options.memory_gib * 2**30 if options.memory_gib else device.memory_bytes * USABLE_MEMORY)
    workload = Workload(prompt_tokens=mean_prompt, output_tokens=mean_output)
    costs = CostModel(shape, profile, memory_bytes, workload, options.max_batch)
    fit = check_fit(costs, trace, ranks_per_instance)
    arrivals = options.arrivals or f"poisson:{sensible_arrivals_per_s(costs, trace, ranks_per_instance):g}"
    prices = prices_of(options.prices, device.instance_type)
    links = Links(
        inter_bytes_per_s=INTER_FRACTION * device.inter_bytes_per_s,
        intra_bytes_per_s=device.achieved_intra_bytes_per_s,
        disk_bytes_per_s=DISK_BYTES_PER_S,
    )
    requests = requests_of(arrivals, prompts, outputs, trace, options.seed)
    scenario = Scenario(
        name=f"{model.name} on {trace.name}",
        model=shape,
        profile=profile,
        trace=trace,
        requests=requests,
        ranks_per_instance=ranks_per_instance,
        memory_bytes=memory_bytes,
        links=links,
        prices=prices,
        required_per_s=len(requests) / trace.end_s,
        min_ranks=fit.num_ranks,
        max_batch=options.max_batch,
        notice_s=options.notice_s,
        acquisition_s=options.acquisition_s,
        seed=options.seed,
        drain_s=options.drain_s,
    )
    return Setup(scenario=scenario, fit=fit, facts=_facts(options, scenario, arrivals, dtype, device))


def device_of(name: str) -> Device:
    """Raises InputError with the names of those that are known."""
    by_name = {known.lower(): device for known, device in DEVICES.items()}
    found = by_name.get(name.lower())
    if found is None:
        raise InputError("--device", None, None, f"{name!r} is not known; there are {', '.join(DEVICES)}")
    return found


def find_trace(given: str) -> CapacityTrace:
    """A file, or one of the example traces by its name. Raises InputError."""
    if given in TRACES:
        return read_trace(Path(str(files("loadtest") / "traces" / f"{given}.csv")))
    path = Path(given).expanduser()
    if not path.is_file():
        raise InputError("--trace", None, None, f"{given!r} is neither a file nor one of {', '.join(TRACES)}")
    return read_trace(path)


def lengths_of(given: str, cv: float) -> tuple[Lengths, Lengths, int]:
    """Prompts, outputs, and the tokens of the longest request. Raises InputError."""
    means = numbers(given, "--lengths", "PROMPT,OUTPUT")
    if any(mean < 1 or mean != int(mean) for mean in means):
        raise InputError("--lengths", None, None, f"{given!r}: lengths are whole numbers of tokens from 1")
    prompt, output = (int(mean) for mean in means)
    if cv == 0:
        return Fixed(prompt), Fixed(output), prompt + output
    longest = [round(mean * (1 + 4 * cv)) for mean in (prompt, output)]
    prompts, outputs = (LogNormal(mean=m, cv=cv, maximum=x) for m, x in zip((prompt, output), longest, strict=True))
    return prompts, outputs, sum(longest)


def requests_of(given: str, prompts: Lengths, outputs: Lengths, trace: CapacityTrace, seed: int) -> tuple[Request, ...]:
    """Those of a file of the artifact, or drawn: `poisson:RATE`, `gamma:RATE,CV`, `rates:FILE`. Raises InputError."""
    rng = np.random.default_rng(seed)
    kind, colon, rest = given.partition(":")
    if not colon:
        if not Path(given).expanduser().is_file():
            forms = "poisson:RATE, gamma:RATE,CV, rates:FILE, or a file of the artifact"
            raise InputError("--arrivals", None, None, f"{given!r} is none of {forms}")
        # An output of a drawn length has its own length for each request; the artifact's file only has prompts.
        read = read_requests(Path(given).expanduser(), output_tokens=1)
        requests = tuple(msgspec.structs.replace(r, output_tokens=outputs.draw(rng)) for r in read)
        return _within(requests, trace)
    if kind == "poisson":
        (rate_per_s,) = numbers(rest, "--arrivals", "RATE")
        arrivals_s = poisson(rate_per_s, trace.end_s, rng)
    elif kind == "gamma":
        rate_per_s, cv = numbers(rest, "--arrivals", "RATE,CV")
        arrivals_s = gamma(rate_per_s, cv, trace.end_s, rng)
    elif kind == "rates":
        arrivals_s = per_minute(read_rates(Path(rest).expanduser()), rng)
    else:
        raise InputError("--arrivals", None, None, f"{kind!r} is not known; there are poisson, gamma, rates, or a file")
    return _within(make_requests(arrivals_s, prompts, outputs, rng), trace)


def dtype_of(given: str | None, device: Device) -> str:
    """bfloat16 where the device computes in it, otherwise float16. Raises InputError for what it cannot do."""
    dtype = given or ("bfloat16" if "bfloat16" in device.flops_per_s else "float16")
    if dtype not in device.flops_per_s:
        raise InputError("--dtype", None, None, f"{dtype!r}: {device.name} does {', '.join(device.flops_per_s)}")
    return dtype


def prices_of(given: str | None, instance_type: str) -> Prices:
    """`SPOT,ON_DEMAND` in US dollars an hour of an instance, or the list's. Raises InputError."""
    if given is None:
        listed = list_prices(instance_type)
        if listed is None:
            raise InputError("--prices", None, None, f"needed: there is no list price for {instance_type}")
        return listed
    spot_per_h, on_demand_per_h = numbers(given, "--prices", "SPOT,ON_DEMAND")
    return Prices(spot_per_h=spot_per_h, on_demand_per_h=on_demand_per_h)


def numbers(given: str, option: str, form: str) -> list[float]:
    """The numbers of `given`, which looks like `form`; none of them negative. Raises InputError."""
    try:
        values = [float(word) for word in given.split(",")]
    except ValueError:
        values = []
    if len(values) != form.count(",") + 1:
        raise InputError(option, None, None, f"{given!r} is not {form}")
    if not all(0 <= value < math.inf for value in values):
        raise InputError(option, None, None, f"{given!r} has a number that is negative or not finite")
    return values


def _within(requests: tuple[Request, ...], trace: CapacityTrace) -> tuple[Request, ...]:
    inside = tuple(request for request in requests if request.arrival_s < trace.end_s)
    if not inside:
        raise InputError("--arrivals", None, None, f"no request arrives in the {trace.end_s:g} s of the trace")
    return inside


def _shape(model: Model, dtype: str, asked: int | None, longest: int) -> ModelShape:
    limit = model.config.model_len(None)
    max_model_len = asked or min(limit, max(MAX_MODEL_LEN, longest))
    if longest > max_model_len or max_model_len > limit:
        problem = f"{max_model_len} tokens: requests have up to {longest}, and {model.name} can do {limit}"
        raise InputError("--max-model-len", None, None, problem)
    return model.config.shape(model.name, DTYPE_BYTES[dtype], KV_BLOCK_TOKENS, max_model_len)


def _profile(path: Path | None, model: Model, dtype: str, device: Device, prompt_tokens: int) -> Profile:
    if path is None:
        return roofline_profile(decoder_shape(model, dtype), device, prompt_tokens=prompt_tokens)
    try:
        profile = decode_profile(path.expanduser().read_bytes(), str(path))
    except OSError as error:
        raise InputError("--profile", None, None, f"{path}: {error.strerror or error}") from error
    if profile.num_layers != model.config.num_layers:
        reason = f"{profile.num_layers}, but {model.name} has {model.config.num_layers}"
        raise ProfileError(str(path), "num_layers", reason)
    return profile


def _facts(options: Options, scenario: Scenario, arrivals: str, dtype: str, device: Device) -> list[Fact]:
    """Everything that the figures depend on, and where it comes from."""
    links, prices, requests = scenario.links, scenario.prices, scenario.requests
    type_source = f"{device.instance_type}: {SOURCE}"

    def given(option: str, value: object, otherwise: str) -> str:
        return otherwise if value is None else option

    rows = [
        ("model", f"{scenario.model.name}, {dtype}", "--model, --dtype"),
        ("weights", describe_gib(weights_bytes(scenario.model)), "its sizes"),
        (
            "longest sequence",
            f"{scenario.model.max_model_len} tokens",
            given("--max-model-len", options.max_model_len, "default"),
        ),
        (
            "device",
            f"{device.name}, {scenario.ranks_per_instance} an instance",
            given("--ranks-per-instance", options.ranks_per_instance, device.instance_type),
        ),
        (
            "usable memory of a device",
            describe_gib(scenario.memory_bytes),
            given("--memory-gib", options.memory_gib, f"{USABLE_MEMORY:.0%} of it"),
        ),
        (
            "step times",
            scenario.profile.name,
            "--profile"
            if options.profile
            else "roofline estimate from the model's sizes and the device's data sheet: not measured",
        ),
        ("trace", f"{scenario.trace.name}, {scenario.trace.end_s:g} s", "--trace"),
        (
            "arrivals",
            f"{arrivals}: {len(requests)} requests",
            given("--arrivals", options.arrivals, "60 % of what the median fleet can serve"),
        ),
        (
            "lengths",
            f"{options.lengths} tokens (prompt, output), coefficient of variation {options.lengths_cv:g}",
            "--lengths, --lengths-cv",
        ),
        ("sequences of a pipeline at once", f"up to {scenario.max_batch}", "--max-batch"),
        ("notice", f"{scenario.notice_s:g} s", "--notice"),
        ("acquisition", f"{scenario.acquisition_s:g} s", "--acquisition"),
        (
            "USD an hour of an instance",
            f"{prices.spot_per_h:g} spot, {prices.on_demand_per_h:g} on-demand",
            given("--prices", options.prices, type_source),
        ),
        ("between instances", f"{links.inter_bytes_per_s / 1e9:.3g} GB/s", device.instance_type),
        ("inside an instance", f"{links.intra_bytes_per_s / 1e9:.3g} GB/s", device.name),
        ("disk", f"{links.disk_bytes_per_s / 1e9:.3g} GB/s", "assumed"),
        (
            "after the trace",
            "until all is done" if scenario.drain_s == math.inf else f"{scenario.drain_s:g} s",
            "--drain",
        ),
        ("seed", str(scenario.seed), "--seed"),
    ]
    return [Fact(name=name, value=value, source=source) for name, value, source in rows]
