"""Agent and rank processes: joining, bad input, lost holders, crashes and ends."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import struct
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import psutil
from safetensors.torch import load_file, save_file

from engine.protocol import EngineSubjects
from planner.protocol import (
    Arrange,
    InstanceInventory,
    Phase,
    PlannerSubjects,
    RankAddress,
    Transfer,
    UnitRange,
)

if TYPE_CHECKING:
    from tests.integration.engine.conftest import Cluster, Instance, World

PLANNER, ENGINE = PlannerSubjects("tiny"), EngineSubjects("tiny")
NOWHERE = RankAddress(instance="ghost", context_address="127.0.0.1:1", store_address="127.0.0.1:1")


async def test_an_instance_joins_with_its_inventory_and_shows_that_it_lives(world: World) -> None:
    await world.instances("i1", "i2")
    for name in ("i1", "i2"):
        inventory = world.inventories[name]
        (rank,) = inventory.ranks
        assert (rank.rank, rank.device, rank.memory_bytes) == (f"{name}-0", "cpu", 1 << 28)
        assert inventory.profile is not None
        assert inventory.model.num_head_groups == 3
        host, _, port = inventory.liveness_address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        assert len(await asyncio.wait_for(reader.readexactly(3), 10)) == 3
        writer.close()

        async def is_stored(name: str = name) -> InstanceInventory:
            entry = await world.stored_inventories.get(name)
            return msgspec.msgpack.decode(entry.value, type=InstanceInventory)

        assert (await is_stored()).instance == name


async def test_bad_messages_are_named_and_the_rest_goes_on(world: World) -> None:
    (instance,) = await world.instances("i1")
    pipeline = await world.serve("i1")
    expected = await world.generate(pipeline)
    subjects = [
        PLANNER.plan,
        PLANNER.arrange,
        ENGINE.pull("i1-0"),
        ENGINE.release("i1-0"),
        ENGINE.report("i1-0"),
        ENGINE.submit(pipeline.id),
        ENGINE.cancel(pipeline.id),
        ENGINE.resend(pipeline.id),
    ]
    for subject in subjects:
        await world.client.publish(subject, b"\xc1 no message")
    await world.plans.put("current", b"\xc1 no plan")
    subjects.append(f"{PLANNER.plan_bucket}/current")
    lines = [f"event=malformed_message subject={subject} " for subject in subjects]
    await world.until(lambda: all(line in instance.log for line in lines), "every malformed message is logged")
    stale = (await world.plan(pipeline)).epoch - 1
    await world.client.publish(
        PLANNER.plan, msgspec.msgpack.encode(msgspec.structs.replace(await world.plan(pipeline), epoch=stale))
    )
    await world.until(lambda: f"event=stale_plan epoch={stale} " in instance.log, "the stale plan is logged")
    assert await world.generate(pipeline) == expected
    assert not world.has_said("i1-0", Phase.BROKEN, pipeline)


async def test_a_plan_with_an_unknown_rank_fails_by_name_until_the_next_plan(world: World) -> None:
    await world.instances("i1")
    pipeline = world.pipeline("ghost", "i1")
    await world.plan(pipeline)
    # Said again and again: a message can be lost.
    await world.until(lambda: len(world.has_said("i1-0", Phase.PREPARE_FAILED, pipeline)) >= 3, "it is reported")
    assert "ghost-0" in world.has_said("i1-0", Phase.PREPARE_FAILED, pipeline)[0].detail
    await world.plan(world.pipeline("ghost"))
    assert await world.generate(await world.serve("i1"))


async def test_plans_that_supersede_each_other_while_a_member_is_awaited(world: World) -> None:
    await world.instances("i1", "i2")
    for _ in range(10):
        await world.plan(world.pipeline("i1", "ghost"), addresses={"ghost-0": NOWHERE})
    started_s = time.monotonic()
    assert await world.generate(await world.serve("i1", "i2"))
    assert time.monotonic() - started_s < 15, "it waited for members that never come"


async def test_a_lone_request_on_two_stages_does_not_wait_between_its_tokens(world: World) -> None:
    await world.instances("i1", "i2")
    pipeline = await world.serve("i1", "i2")
    started_s = time.monotonic()
    await world.generate(pipeline, 100)
    assert time.monotonic() - started_s < 25, "idle waits of 0.5 s would add up to 50 s"


async def test_a_pipeline_retired_before_it_was_ready_stops_and_did_not_break(world: World) -> None:
    await world.instances("i1", "i2")
    old = await world.serve("i2")
    new = world.pipeline("i1", "i2")
    await world.plan(new, retiring=(old,))
    await world.until(
        lambda: all(world.has_said(rank, Phase.PREPARED, new) for rank in ("i1-0", "i2-0")), "both ranks prepare"
    )
    await world.until(lambda: world.inventories["i1"].ranks[0].pipeline == new.id, "i1 has started")
    # i2 still runs the old one, and goes on with it.
    epoch = (await world.plan(old, retiring=(new,))).epoch
    await world.client.publish(PLANNER.arrange, msgspec.msgpack.encode(Arrange(epoch=epoch, pipelines=[new.id])))
    await world.until(lambda: world.has_said("i1-0", Phase.STOPPED, new), "i1 stops")
    await world.until(lambda: world.inventories["i1"].ranks[0].pipeline is None, "i1 is free")
    assert not world.has_said("i1-0", Phase.BROKEN, new)
    assert await world.generate(old)
    assert await world.generate(await world.serve("i1", "i2"))


@asynccontextmanager
async def liar() -> AsyncIterator[RankAddress]:
    """A holder whose bytes do not fit their checksum."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        (length,) = struct.unpack("<I", await reader.readexactly(4))
        await reader.readexactly(length)
        writer.write(struct.pack("<BQQ", 0, 8, 1) + b"mistakes")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        yield RankAddress(instance="liar", context_address=address, store_address=address)


async def test_weights_come_from_the_next_holder_and_at_last_from_disk(world: World) -> None:
    _, instance = await world.instances("i1", "i2")
    expected = await world.generate(await world.serve("i1"))
    whole = UnitRange(first_layer=-1, last_layer=world.model.num_layers, first_group=0, last_group=2)

    async def bring_back_the_first_half(*sources: str) -> tuple[int, int]:
        # i2 serves layers 3-5, and has freed the rest; i1 has all, since a pipeline of its own is prepared there.
        await world.serve("i1", "i2")
        await world.until(lambda: all(u.first_layer > 2 for u in world.inventories["i2"].ranks[0].units), "i2 frees")
        pipelines = [world.pipeline("i1"), world.pipeline("i2")]
        async with liar() as address:
            await world.plan(
                *pipelines,
                transfers={"i2-0": [Transfer(units=whole, sources=list(sources))]},
                addresses={"liar-0": address, "ghost-0": NOWHERE},
            )
            await world.until(lambda: world.is_serving(pipelines[1]), "i2 serves alone")
        assert await world.generate(pipelines[1]) == expected
        (report,) = world.has_said("i2-0", Phase.PREPARED, pipelines[1])
        return report.pulled_bytes, report.pulled_from_disk_bytes

    pulled_bytes, disk_bytes = await bring_back_the_first_half("liar-0", "ghost-0", "i1-0")
    assert pulled_bytes > 0
    assert disk_bytes == 0
    assert "cannot fetch weights (layer -1, head group 0) from liar-0: wrong checksum" in instance.log
    assert "cannot fetch context from ghost-0: " in instance.log
    pulled_bytes, disk_bytes = await bring_back_the_first_half("liar-0", "ghost-0")
    assert pulled_bytes == 0
    assert disk_bytes > 0


async def test_a_killed_rank_is_reported_and_comes_back_usable(world: World) -> None:
    first, second = await world.instances("i1", "i2")
    pipeline = await world.serve("i1", "i2")
    request = await world.submit(pipeline, 2000)
    await world.until(lambda: len(world.tokens.get(request, [])) > 3, "it decodes")
    before = world.address("i2")
    os.kill(second.rank_pid(), signal.SIGKILL)
    killed_s = time.time()
    await world.until(lambda: world.has_said("i2-0", Phase.BROKEN, pipeline), "the agent reports it")
    # The leader says it until it hears of another plan.
    await world.until(lambda: len(world.has_said("i1-0", Phase.BROKEN, pipeline)) >= 3, "the leader reports it")
    assert world.has_said("i1-0", Phase.BROKEN, pipeline)[0].at_s - killed_s < 5
    await world.until(lambda: not world.inventories["i2"].ranks, "the inventory is without it")
    await world.until(
        lambda: bool(world.inventories["i2"].ranks) and world.address("i2") != before, "the rank comes back"
    )
    await world.until(lambda: "event=waits_for_next_plan" in second.log, "it does not join what its predecessor ran")
    assert not world.has_said("i2-0", Phase.PREPARE_FAILED, pipeline)
    assert await world.generate(await world.serve("i2", "i1"))
    assert first.process.poll() is None
    assert second.process.poll() is None


def is_alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


async def ended(instance: Instance, world: World, timeout_s: float) -> int:
    await world.until(lambda: instance.process.poll() is not None, f"{instance.name} ends", timeout_s)
    return int(instance.process.wait())


async def test_an_agent_told_to_stop_ends_at_once_with_its_rank_while_it_decodes(world: World) -> None:
    (instance,) = await world.instances("i1")
    pipeline = await world.serve("i1")
    request = await world.submit(pipeline, 2000)
    await world.until(lambda: len(world.tokens.get(request, [])) > 3, "it decodes")
    pids = instance.pids()
    assert len(pids) == 2
    instance.process.send_signal(signal.SIGTERM)
    assert await ended(instance, world, 7) == 0
    await world.until(lambda: not any(map(is_alive, pids)), "no process is left", 2)
    assert "Traceback" not in instance.log


async def test_a_rank_ends_with_its_killed_agent(world: World) -> None:
    (instance,) = await world.instances("i2")
    rank = instance.rank_pid()
    instance.process.kill()
    await world.until(lambda: not is_alive(rank), "the rank ends", 5)


def without_a_tensor(model_dir: Path, target: Path) -> Path:
    shutil.copytree(model_dir, target)
    weights = load_file(target / "model.safetensors")
    del weights["model.layers.3.mlp.up_proj.weight"]
    save_file(weights, target / "model.safetensors")
    return target


def of_another_family(model_dir: Path, target: Path) -> Path:
    shutil.copytree(model_dir, target)
    config = json.loads((target / "config.json").read_text())
    config |= {"model_type": "mamba", "architectures": ["MambaForCausalLM"]}
    (target / "config.json").write_text(json.dumps(config))
    return target


async def test_what_cannot_be_served_ends_the_agent_with_one_clear_line(
    world: World, cluster: Cluster, tmp_path: Path
) -> None:
    expected = {
        cluster.start("bad1", model_dir=without_a_tensor(cluster.model_dir, tmp_path / "bad1")): (
            1,
            "model.layers.3.mlp.up_proj.weight is missing",
        ),
        cluster.start("bad2", model_dir=of_another_family(cluster.model_dir, tmp_path / "bad2")): (1, "mamba"),
        cluster.start("bad3", host="203.0.113.1"): (2, "SPOTSERVE_ENGINE_HOST: cannot listen on '203.0.113.1'"),
        cluster.start("bad4", dtype="int4"): (2, "SPOTSERVE_ENGINE_DTYPE: 'int4' is not valid"),
    }
    for instance, (code, cause) in expected.items():
        assert await ended(instance, world, 60) == code
        lines = [line for line in instance.log.splitlines() if line.startswith("engine: ")]
        assert cause in lines[0]
        assert len(lines) == code % 2 + 1, "the rank's, and the agent's that its rank has ended"
        assert "Traceback" not in instance.log
