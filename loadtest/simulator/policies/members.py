"""What our fleet consists of: instances, their ranks, pipelines on their way, and what an agent tells of them."""

from __future__ import annotations

import math
from collections.abc import Mapping

from loadtest.simulator.clock import Timer
from loadtest.simulator.network import Place
from loadtest.simulator.scenario import Scenario
from planner.protocol import InstanceInventory, Market, Pipeline, RankInventory, UnitRange


class Rank:
    def __init__(self, name: str, instance: str) -> None:
        self.place = Place(instance, name)
        self.units: list[UnitRange] = []
        self.runs: str | None = None
        self.prepared: list[str] = []


class Instance:
    def __init__(self, name: str, market: Market, num_ranks: int) -> None:
        self.name = name
        self.market = market
        self.ranks = [Rank(f"{name}-{index}", name) for index in range(num_ranks)]
        self.deadline_s = math.inf


class Preparation:
    """A pipeline of the plan on its way."""

    def __init__(self, planned: Pipeline) -> None:
        self.planned = planned
        self.timers: dict[str, Timer] = {}
        """By rank that still pulls."""
        self.sources: set[str] = set()
        """Instances that they pull from."""


def inventory_of(instance: Instance, scenario: Scenario, epoch: int, kv_tokens: Mapping[str, int]) -> InstanceInventory:
    """As its agent tells the planner; `kv_tokens` by running pipeline."""
    name = instance.name
    return InstanceInventory(
        instance=name,
        market=instance.market,
        liveness_address=f"{name}:1",
        model=scenario.model,
        ranks=[_rank_inventory(rank, scenario, kv_tokens) for rank in instance.ranks],
        epoch=epoch,
    )


def _rank_inventory(rank: Rank, scenario: Scenario, kv_tokens: Mapping[str, int]) -> RankInventory:
    name = rank.place.rank
    return RankInventory(
        rank=name,
        device=scenario.profile.name,
        memory_bytes=scenario.memory_bytes,
        context_address=f"{name}:1",
        store_address=f"{name}:2",
        units=rank.units,
        pipeline=rank.runs,
        prepared=rank.prepared,
        kv_tokens=kv_tokens.get(rank.runs, 0) if rank.runs is not None else 0,
    )
