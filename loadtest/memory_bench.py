"""What a rank uses beside its share of weights and KV: resident memory while it serves."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec
import psutil

from engine.protocol import PipelineState
from loadtest.errors import StackError
from loadtest.recorder import Recorder, until
from loadtest.report import Check, Report, Table
from loadtest.stack import LocalStack
from loadtest.streams import Traffic
from planner.protocol import ModelShape, Pipeline, Plan

BESIDE_TARGET_MB: Final = 700.0
MB: Final = 1e6
NUM_STREAMS: Final = 6
NUM_PROMPT_TOKENS: Final = 64
NUM_TOKENS: Final = 256
CHUNKS_BEFORE: Final = 30
"""Tokens of each stream before memory is read: by then every code path of decoding has run."""
TIMEOUT_S: Final = 120.0
PEAK: Final = re.compile(r"^VmHWM:\s+(\d+) kB$", re.MULTILINE)


class RankMemory(msgspec.Struct, frozen=True, kw_only=True):
    rank: str
    resident_bytes: int
    peak_resident_bytes: int | None
    """Since its start, loading included; None where the system does not tell."""
    weight_bytes: int
    """Of its position."""
    kv_bytes: int
    """Of the KV blocks in use."""

    @property
    def beside_bytes(self) -> int:
        return self.resident_bytes - self.weight_bytes - self.kv_bytes


def weight_bytes(model: ModelShape, pipeline: Pipeline, rank: str) -> int:
    """Of the units that `rank` needs for its position in `pipeline`."""
    return sum(
        model.unit_bytes(layer) * (shard.last_group - shard.first_group + 1)
        for stage in pipeline.stages
        for shard in stage.shards
        if shard.rank == rank
        for layer in model.layers_of_stage(stage.first_layer, stage.last_layer)
    )


def kv_bytes(model: ModelShape, pipeline: Pipeline, rank: str, num_blocks: int) -> int:
    """Of `num_blocks` KV blocks of `pipeline` on `rank`."""
    units = sum(
        (stage.last_layer - stage.first_layer + 1) * (shard.last_group - shard.first_group + 1)
        for stage in pipeline.stages
        for shard in stage.shards
        if shard.rank == rank
    )
    return num_blocks * model.kv_block_tokens * units * model.kv_unit_bytes_per_token


def measure_ranks(plan: Plan, states: Mapping[str, PipelineState], pids: Mapping[str, int]) -> list[RankMemory]:
    """Every rank of `plan`; `pids` are those of the rank processes."""
    found = []
    for pipeline in plan.pipelines:
        state = states[pipeline.id]
        num_blocks = state.total_kv_blocks - state.free_kv_blocks
        for rank in pipeline.ranks():
            found.append(
                RankMemory(
                    rank=rank,
                    resident_bytes=psutil.Process(pids[rank]).memory_info().rss,
                    peak_resident_bytes=_peak_bytes(pids[rank]),
                    weight_bytes=weight_bytes(plan.model, pipeline, rank),
                    kv_bytes=kv_bytes(plan.model, pipeline, rank, num_blocks),
                )
            )
    return sorted(found, key=lambda one: one.rank)


def _peak_bytes(pid: int) -> int | None:
    status = Path(f"/proc/{pid}/status")
    peak = PEAK.search(status.read_text()) if status.exists() else None
    return int(peak.group(1)) * 1024 if peak else None


def rank_pids(agents: Mapping[str, int], plan: Plan) -> dict[str, int]:
    """The rank processes: children of the agents, in the order in which they were started."""
    pids = {}
    for instance, agent in agents.items():
        children = sorted(psutil.Process(agent).children(), key=lambda child: (child.create_time(), child.pid))
        pids.update({f"{instance}-{index}": child.pid for index, child in enumerate(children)})
    return {rank: pids[rank] for pipeline in plan.pipelines for rank in pipeline.ranks()}


async def _measure(stack: LocalStack, num_instances: int) -> list[RankMemory]:
    running = stack.running
    traffic = Traffic(
        stack.endpoint,
        running.served_model_name,
        num_streams=NUM_STREAMS,
        num_prompt_tokens=NUM_PROMPT_TOKENS,
        num_tokens=NUM_TOKENS,
    )
    async with Recorder(running.nats_url, running.model) as recorder:

        async def is_settled() -> bool:
            status = await recorder.status()
            return status is not None and recorder.is_settled(status, num_instances)

        async def is_warm() -> bool:
            return min(traffic.progress()) >= CHUNKS_BEFORE

        if not await until(is_settled, TIMEOUT_S):
            raise StackError(f"{num_instances} instances did not all serve in {TIMEOUT_S:g} s", stack.directory)
        async with traffic:
            if not await until(is_warm, TIMEOUT_S):
                raise StackError(f"the streams did not get going in {TIMEOUT_S:g} s", stack.directory)
            return await _measure_all(stack, recorder)


async def _measure_all(stack: LocalStack, recorder: Recorder) -> list[RankMemory]:
    status = await recorder.status()
    if status is None or status.plan is None:
        raise StackError("the planner does not answer", stack.directory)
    pids = stack.running.pids
    agents = {i.id: pids[i.id] for i in status.instances if i.id in pids}
    return measure_ranks(status.plan, recorder.states, rank_pids(agents, status.plan))


def run(up_options: list[str], num_instances: int) -> Report:
    """Start a stack, let it serve, look at its ranks, stop it."""
    print(f"memory: starting {num_instances} instances", file=sys.stderr, flush=True)
    shape = ["--instances", str(num_instances), "--pipelines", str(num_instances), "--stages", "1", "--tensor", "1"]
    with LocalStack([*shape, *up_options]) as stack:
        ranks = asyncio.run(_measure(stack, num_instances))
    worst = max((rank.beside_bytes for rank in ranks), default=None)
    value_mb = worst / MB if worst is not None else None
    check = Check(name="a rank beside weights and KV, most", value=value_mb, unit="MB", target=BESIDE_TARGET_MB)
    return Report(name="memory", tables=[_table(ranks)], checks=[check], figures=ranks)


def _table(ranks: list[RankMemory]) -> Table:
    rows = [
        [
            rank.rank,
            *(f"{n / MB:.0f}" for n in (rank.resident_bytes, rank.weight_bytes, rank.kv_bytes, rank.beside_bytes)),
            f"{rank.peak_resident_bytes / MB:.0f}" if rank.peak_resident_bytes is not None else "-",
        ]
        for rank in ranks
    ]
    columns = ["rank", "resident", "weights", "KV in use", "beside them", "peak resident"]
    return Table(f"memory: MB of each rank while {NUM_STREAMS} streams decode", columns, rows)
