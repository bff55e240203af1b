"""The scenarios of the SpotServe paper from the data of its artifact: models, traces, queries, fleet."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from loadtest.errors import InputError
from loadtest.simulator.inputs import read_requests, read_trace
from loadtest.simulator.scenario import CapacityEvent, CapacityTrace, Request, Scenario
from planner.core.links import Links
from planner.core.profile import Profile
from planner.core.profile_json import decode_profile
from planner.protocol import Market, ModelShape

PARAMETER_BYTES: Final = 4
"""fp32 weights and KV."""
PROMPT_TOKENS: Final = 512
OUTPUT_TOKENS: Final = 128
MAX_MODEL_LEN: Final = PROMPT_TOKENS + OUTPUT_TOKENS
RANKS_PER_INSTANCE: Final = 4
"""g4dn.12xlarge: four T4s."""
RANK_BYTES: Final = 9_000_000_000
"""What weights, KV and activations may take of a T4's 16 GB: two processes with their device contexts, workspaces and
the buffers of migrations take the rest. One number for the three models; with it their least fleets are the paper's
(Table 1: 4, 12 and 16 GPUs), counted in whole instances."""
LINKS: Final = Links(
    inter_bytes_per_s=50e9 / 8,
    intra_bytes_per_s=50e9 / 8,
    disk_bytes_per_s=2e9,
    fixed_s=0.5,
)
"""50 Gbit/s between instances, and the same inside them, and 0.5 s a change: the artifact's estimate. The disk's rate
is of an instance's local NVMe and our assumption, like `Overheads`."""
MAX_BATCH: Final = 16
"""Of all policies on our engine: its default. The policies of the paper use 4, as the artifact's scripts do."""
NOTICE_S: Final = 30.0
ACQUISITION_S: Final = 120.0
TRUE_CV: Final = 6.0
ON_DEMAND_S: Final = 1020.0
"""Length of the artifact's runs on constant fleets."""


class Arrivals(StrEnum):
    ARTIFACT = "artifact"
    """As its files have them: called CV 6, but nearly evenly spaced (coefficient of variation below 0.1)."""
    BURSTY = "cv6"
    """As many in the same time, with a coefficient of variation that is 6: shape 1/36."""


class PaperModel(msgspec.Struct, frozen=True, kw_only=True):
    shape: ModelShape
    profile: str
    queries: str
    required_per_s: float
    """The throughput that the artifact's scripts ask its solver for."""
    min_ranks: int


def _shape(name: str, hidden: int, num_heads: int, num_layers: int, vocab: int) -> ModelShape:
    """Decoder of the OPT kind: 12 h^2 weights and 13 h biases and norms a layer, one head a group, tied embeddings.

    The sizes that Table 1 prints (25.0, 74.5, 111.8 GB) are 6.7, 20 and 30 thousand million parameters of 4 bytes in
    GiB; those of these shapes are 24.8, 75.4 and 111.6 GiB.
    """

    def bytes_of(num_parameters: int) -> int:
        return round(num_parameters * PARAMETER_BYTES / num_heads)

    return ModelShape(
        name=name,
        num_layers=num_layers,
        num_head_groups=num_heads,
        decoder_unit_bytes=bytes_of(12 * hidden**2 + 13 * hidden),
        embedding_unit_bytes=bytes_of((vocab + MAX_MODEL_LEN) * hidden),
        head_unit_bytes=bytes_of(2 * hidden),
        kv_unit_bytes_per_token=bytes_of(2 * hidden),
        kv_block_tokens=16,
        max_model_len=MAX_MODEL_LEN,
        hidden_bytes_per_token=hidden * PARAMETER_BYTES,
        tied_embeddings=True,
    )


MODELS: Final = {
    model.shape.name: model
    for model in (
        PaperModel(
            shape=_shape("OPT-6.7B", 4096, 32, 32, 51200),
            profile="megatron_6.7B_profile.json",
            queries="query6144_tpt1.5_cv6.txt",
            required_per_s=2.0,
            min_ranks=4,
        ),
        PaperModel(
            shape=_shape("GPT-20B", 6144, 48, 44, 51200),
            profile="megatron_h6144_profile.json",
            queries="query_tpt0.35_cv6.txt",
            required_per_s=0.4,
            min_ranks=12,
        ),
        PaperModel(
            shape=_shape("LLaMA-30B", 7168, 56, 48, 50304),
            profile="megatron_h7168_profile.json",
            queries="query_tpt0.2_cv6.txt",
            required_per_s=0.2,
            min_ranks=16,
        ),
    )
}
TRACES: Final = {
    "A_S": "trace_0304_real.txt",
    "B_S": "trace_0506_real.txt",
    "A_S+O": "trace_0304_ondemand.txt",
    "B_S+O": "trace_0506_ondemand.txt",
}
WORKLOAD_MODEL: Final = "GPT-20B"
WORKLOAD_TRACES: Final = {"A'_S+O": "trace_0304_workload.txt", "B'_S+O": "trace_0506_workload.txt"}
WORKLOAD_QUERIES: Final = "query_realAr_cv6.txt"
WORKLOAD_REQUIRED_PER_S: Final = 0.6


def paper_scenario(
    data: Path, model: str, trace: str, arrivals: Arrivals = Arrivals.ARTIFACT, seed: int = 0
) -> Scenario:
    """One cell of Fig. 6. Raises InputError or ProfileError for what is missing or damaged, KeyError for a name."""
    return _scenario(data, MODELS[model], read_paper_trace(data, trace), MODELS[model].queries, arrivals, seed)


def workload_scenario(data: Path, trace: str, arrivals: Arrivals = Arrivals.ARTIFACT, seed: int = 0) -> Scenario:
    """One of Fig. 8: GPT-20B, and arrivals that change from minute to minute. Raises as `paper_scenario`."""
    model = msgspec.structs.replace(MODELS[WORKLOAD_MODEL], required_per_s=WORKLOAD_REQUIRED_PER_S)
    return _scenario(data, model, read_paper_trace(data, trace), WORKLOAD_QUERIES, arrivals, seed)


def constant_scenario(
    data: Path, model: str, num_instances: int, arrivals: Arrivals = Arrivals.ARTIFACT, seed: int = 0
) -> Scenario:
    """Of Fig. 7: on-demand instances that stay; made here, as the artifact's file for 3 of them has 4."""
    names = tuple(f"node-{number}" for number in range(num_instances))
    event = CapacityEvent(at_s=0.0, added=names, market=Market.ON_DEMAND)
    trace = CapacityTrace(name=f"{num_instances} on demand", events=(event,), end_s=ON_DEMAND_S)
    return _scenario(data, MODELS[model], trace, MODELS[model].queries, arrivals, seed)


def read_paper_trace(data: Path, name: str) -> CapacityTrace:
    """`name` as in the paper. In the mixed ones (+O) all that comes later is on demand, which the files do not say."""
    files = TRACES | WORKLOAD_TRACES
    trace = read_trace(data / "traces" / files[name])
    is_mixed = name.endswith("+O")
    events = [
        msgspec.structs.replace(event, market=Market.ON_DEMAND) if is_mixed and event.at_s > 0 else event
        for event in trace.events
    ]
    return msgspec.structs.replace(trace, name=name, events=tuple(events))


def bursty(requests: tuple[Request, ...], end_s: float, cv: float, seed: int) -> tuple[Request, ...]:
    """As many requests until `end_s`, at the same rate over time, with this coefficient of variation.

    Gamma gaps, scaled to the number of requests, are laid on the given arrivals as on a clock: the n-th given arrival
    is hour n of it.
    """
    num = len(requests)
    if not num:
        return ()
    gaps = np.random.default_rng(seed).gamma(1 / cv**2, cv**2, num + 1)
    hours = np.cumsum(gaps)[:num] * (num + 1) / gaps.sum()
    clock_s = [0.0, *(request.arrival_s for request in requests), end_s]
    arrivals_s = np.interp(hours, np.arange(num + 2), clock_s)
    return tuple(
        msgspec.structs.replace(request, arrival_s=float(at_s))
        for request, at_s in zip(requests, arrivals_s, strict=True)
    )


def _scenario(
    data: Path, model: PaperModel, trace: CapacityTrace, queries: str, arrivals: Arrivals, seed: int
) -> Scenario:
    requests = tuple(
        request
        for request in read_requests(data / "queries" / queries, OUTPUT_TOKENS)
        if request.arrival_s < trace.end_s
    )
    if arrivals is Arrivals.BURSTY:
        requests = bursty(requests, trace.end_s, TRUE_CV, seed)
    return Scenario(
        name=f"{model.shape.name} on {trace.name}, {arrivals} arrivals",
        model=model.shape,
        profile=_profile(data / "profiles" / "T4-4x" / model.profile),
        trace=trace,
        requests=requests,
        ranks_per_instance=RANKS_PER_INSTANCE,
        memory_bytes=RANK_BYTES,
        links=LINKS,
        required_per_s=model.required_per_s,
        min_ranks=model.min_ranks,
        max_batch=MAX_BATCH,
        notice_s=NOTICE_S,
        acquisition_s=ACQUISITION_S,
        seed=seed,
    )


def _profile(path: Path) -> Profile:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(str(path), None, None, error.strerror or str(error)) from error
    return decode_profile(content, str(path))
