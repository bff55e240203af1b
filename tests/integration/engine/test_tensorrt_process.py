"""A rank with the TensorRT-LLM backend, as a process, with the double of the package on its path."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest
from trtllm_double.control import control

from engine.backends.tensorrt_llm import launch
from engine.backends.tensorrt_llm.processes import marked
from planner.protocol import Arrange, Phase, PlannerSubjects

if TYPE_CHECKING:
    from tests.integration.engine.conftest import Cluster, World

PLANNER = PlannerSubjects("tiny")
DOUBLES = Path(__file__).parents[2] / "doubles"


@pytest.fixture
def instance(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of an instance whose engines are the double's."""
    monkeypatch.setenv("TRTLLM_DOUBLE_DIR", str(tmp_path / "double"))
    monkeypatch.setenv("PYTHONPATH", f"{DOUBLES}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    control.set()
    (tmp_path / "store").mkdir()
    name = f"trt{tmp_path.name[-12:]}".replace("_", "-")
    cluster.start(name, backend="tensorrt_llm", store_dir=tmp_path / "store", shutdown_timeout_s=2, dtype="float32")
    yield name
    cluster.instances[name].end()


async def test_a_new_shape_is_a_new_engine_that_goes_on_from_shared_memory(world: World, instance: str) -> None:
    await world.instances(instance)
    first = await world.serve(instance)
    tokens = await world.generate(first)
    (started,) = world.has_said(f"{instance}-0", Phase.STARTED, first)
    assert {"gpu_wait_s", "weights_s", "warm_up_s"} <= started.phases_s.keys()
    await world.until(lambda: world.inventories[instance].ranks[0].rebuild_s > 0, "the planner hears what it took")
    second = world.pipeline(instance)
    plan = await world.plan(second, retiring=(first,))
    await world.until(lambda: world.has_said(f"{instance}-0", Phase.PREPARED, second), "the next one is prepared")
    (prepared,) = world.has_said(f"{instance}-0", Phase.PREPARED, second)
    assert prepared.pulled_from_disk_bytes == 0
    assert prepared.regroup_s > 0
    arrange = Arrange(epoch=plan.epoch, pipelines=[first.id])
    await world.client.publish(PLANNER.arrange, msgspec.msgpack.encode(arrange))
    await world.until(lambda: world.is_serving(second), "the new engine serves")
    assert world.has_said(f"{instance}-0", Phase.STOPPED, first)
    assert await world.generate(second) == tokens


async def test_an_engine_that_cannot_be_built_is_a_failed_preparation_with_its_cause(
    world: World, instance: str
) -> None:
    await world.instances(instance)
    control.set(fail_phase="weights")
    pipeline = world.pipeline(instance)
    await world.plan(pipeline)
    await world.until(lambda: world.has_said(f"{instance}-0", Phase.PREPARE_FAILED, pipeline), "it says so")
    assert "Executor worker" in world.has_said(f"{instance}-0", Phase.PREPARE_FAILED, pipeline)[0].detail
    control.set()
    assert await world.generate(await world.serve(instance))


async def test_a_wrong_version_is_a_failed_preparation_with_the_reason(world: World, instance: str) -> None:
    await world.instances(instance)
    control.set(version="1.2.0")
    pipeline = world.pipeline(instance)
    await world.plan(pipeline)
    await world.until(lambda: world.has_said(f"{instance}-0", Phase.PREPARE_FAILED, pipeline), "it says so")
    (said, *_) = world.has_said(f"{instance}-0", Phase.PREPARE_FAILED, pipeline)
    assert "corrupts the KV cache" in said.detail
    assert not said.names_shape, "another shape would fail as well"


async def test_a_shape_that_no_engine_can_take_is_named_as_the_cause(world: World, instance: str) -> None:
    await world.instances(instance)
    pipeline = world.pipeline(instance, "ghost")
    pipeline.stages[1].shards.append(msgspec.structs.replace(pipeline.stages[1].shards[0], rank="ghost-1"))
    await world.plan(pipeline)
    await world.until(lambda: world.has_said(f"{instance}-0", Phase.PREPARE_FAILED, pipeline), "it says so")
    (said, *_) = world.has_said(f"{instance}-0", Phase.PREPARE_FAILED, pipeline)
    assert "must all have as many" in said.detail
    assert said.names_shape


async def test_no_process_of_an_engine_outlives_its_rank(world: World, cluster: Cluster, instance: str) -> None:
    (running,) = await world.instances(instance)
    await world.serve(instance)
    mark = launch.mark_of(cluster.nats_url, f"{instance}-0")
    assert marked(mark)
    running.end()
    await world.until(lambda: not marked(mark), "everything is gone")
