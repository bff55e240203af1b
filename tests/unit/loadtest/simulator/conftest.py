"""A small scenario in which a request takes about two seconds."""

from __future__ import annotations

from typing import Any

import pytest

from loadtest.simulator.scenario import CapacityEvent, CapacityTrace, Prices, Request, Scenario
from planner.core.links import Links
from planner.core.profile import DegreeTimes, Profile
from planner.protocol import ModelShape


def build_model(**changes) -> ModelShape:
    """200 MB of weights in four layers and four head groups; 64 kB of KV a token."""
    fields: dict[str, Any] = {
        "name": "toy",
        "num_layers": 4,
        "num_head_groups": 4,
        "decoder_unit_bytes": 10_000_000,
        "embedding_unit_bytes": 10_000_000,
        "head_unit_bytes": 1000,
        "kv_unit_bytes_per_token": 4000,
        "kv_block_tokens": 16,
        "max_model_len": 256,
        "hidden_bytes_per_token": 1024,
        "tied_embeddings": True,
    }
    return ModelShape(**(fields | changes))


def build_profile() -> Profile:
    def times(degree: int) -> DegreeTimes:
        return DegreeTimes(
            batch_sizes=[1, 4, 8],
            decode_layer_ms=[10 / degree, 12 / degree, 16 / degree],
            prefill_layer_ms=[40 / degree, 160 / degree, 320 / degree],
        )

    return Profile(
        name="toy on a toy",
        num_layers=4,
        degrees={degree: times(degree) for degree in (1, 2, 4)},
        head_batch_sizes=[1, 8],
        head_ms=[1.0, 2.0],
        prompt_tokens=64,
        prefill_hop_ms=1.0,
        decode_hop_ms=0.2,
    )


def build_trace(*events: tuple[float, str, str], end_s: float = 60.0) -> CapacityTrace:
    """Events as (time, "+" or "-", names with blanks between)."""
    return CapacityTrace(
        name="toy",
        events=tuple(
            CapacityEvent(
                at_s=at_s,
                added=tuple(names.split()) if sign == "+" else (),
                removed=tuple(names.split()) if sign == "-" else (),
            )
            for at_s, sign, names in events
        ),
        end_s=end_s,
    )


def build_requests(num: int, every_s: float, **changes) -> tuple[Request, ...]:
    fields: dict[str, Any] = {"prompt_tokens": 64, "output_tokens": 40}
    return tuple(Request(id=index, arrival_s=index * every_s, **(fields | changes)) for index in range(num))


def build_scenario(**changes) -> Scenario:
    fields: dict[str, Any] = {
        "name": "toy",
        "model": build_model(),
        "profile": build_profile(),
        "trace": build_trace((0, "+", "a b c"), (20, "-", "b"), (30, "+", "d")),
        "requests": build_requests(100, 0.5),
        "ranks_per_instance": 2,
        "memory_bytes": 150_000_000,
        "links": Links(inter_bytes_per_s=1e9, intra_bytes_per_s=4e9, disk_bytes_per_s=1e8, fixed_s=0.05),
        "prices": Prices(spot_per_h=1.0, on_demand_per_h=3.0),
        "notice_s": 5.0,
        "acquisition_s": 10.0,
        "max_batch": 4,
    }
    return Scenario(**(fields | changes))


@pytest.fixture
def make_scenario():
    return build_scenario


@pytest.fixture
def make_trace():
    return build_trace


@pytest.fixture
def make_requests():
    return build_requests
