"""Shapes that TensorRT-LLM cannot take are refused with the cause; commands for one node and for several."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import pytest

from engine.backends.tensorrt_llm import launch
from engine.backends.tensorrt_llm.shapes import check_fits, engine_spec
from engine.backends.torch.checkpoint import Checkpoint
from engine.core.model_config import ModelConfig
from engine.core.roles import Position
from engine.errors import EngineUnavailable
from engine.settings import EngineSettings
from planner.protocol import ModelShape, Pipeline, Shard, Stage
from tests.tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def config(model_dir: Path) -> ModelConfig:
    return Checkpoint(model_dir).config


@pytest.fixture
def settings(model_dir: Path) -> EngineSettings:
    environ = {"NATS_URL": "nats://x", "MODEL": "m", "MODEL_DIR": str(model_dir), "INSTANCE": "n"}
    environ |= {"BACKEND": "tensorrt_llm"}
    return EngineSettings.from_env({f"SPOTSERVE_ENGINE_{name}": value for name, value in environ.items()})


def store_of(instance: str) -> Path:
    return Path("/store") / instance


def shape_of(config: ModelConfig) -> ModelShape:
    return config.shape("m", 2, 32, None)


def position(stages: list[list[str]], layers: int = 6) -> Position:
    bounds = [number * layers // len(stages) for number in range(len(stages) + 1)]
    built = [
        Stage(
            first_layer=bounds[number],
            last_layer=bounds[number + 1] - 1,
            shards=[
                Shard(
                    rank=rank,
                    instance=rank.rpartition("-")[0],
                    first_group=index * 3 // len(ranks),
                    last_group=(index + 1) * 3 // len(ranks) - 1,
                )
                for index, rank in enumerate(ranks)
            ],
        )
        for number, ranks in enumerate(stages)
    ]
    return Position(Pipeline(id="p1", stages=built, max_batch=4, num_kv_blocks=64), 0, 0, 1, {})


def test_an_engine_is_made_of_its_pipeline(config: ModelConfig, settings: EngineSettings) -> None:
    stages = [[f"n-{stage * 3 + shard}" for shard in range(3)] for stage in range(2)]
    spec = engine_spec(position(stages), shape_of(config), config, settings, store_of)
    assert (spec.tensor, spec.layers, spec.gpus_per_node, spec.max_batch) == (3, [3, 3], 6, 4)
    assert (spec.dtype, spec.block_tokens, spec.num_kv_blocks) == ("bfloat16", 32, 64)
    assert spec.store_dirs == ["/store/n"] * 6
    assert spec.kv_dir == ""


def test_a_degree_that_does_not_divide_the_heads_is_refused(config: ModelConfig, settings: EngineSettings) -> None:
    wrong = position([["n-0", "n-1"]])
    with pytest.raises(EngineUnavailable, match="tensor degree 2 does not divide the 3 KV heads"):
        engine_spec(wrong, shape_of(config), config, settings, store_of)


def test_stages_of_different_degrees_are_refused(config: ModelConfig, settings: EngineSettings) -> None:
    wrong = position([["n-0", "n-1", "n-2"], ["n-3"]])
    with pytest.raises(EngineUnavailable, match=r"its stages have \[1, 3\] shards"):
        engine_spec(wrong, shape_of(config), config, settings, store_of)


def test_a_model_that_does_not_fit_says_how_much_is_needed(config: ModelConfig) -> None:
    model = shape_of(config)
    check_fits(position([["n-0"]]), model, 1 << 30)
    with pytest.raises(EngineUnavailable, match=r"does not fit: .* GiB of weights and .* GiB of KV on a GPU"):
        check_fits(position([["n-0"]]), msgspec.structs.replace(model, decoder_unit_bytes=1 << 30), 1 << 30)


def test_one_node_needs_no_launcher() -> None:
    assert launch.command("mpi", ["10.0.0.1"] * 4, "/s") == [sys.executable, "-m", launch.CHILD_MODULE, "/s"]


def test_several_nodes_start_under_mpi_with_a_task_for_each_gpu() -> None:
    command = launch.command("mpi", ["10.0.0.1", "10.0.0.1", "10.0.0.2", "10.0.0.2"], "/s")
    assert command[:5] == ["mpirun", "-n", "4", "--host", "10.0.0.1:2,10.0.0.2:2"]
    assert command[-5:] == ["trtllm-llmapi-launch", sys.executable, "-m", launch.CHILD_MODULE, "/s"]


def test_with_ray_the_child_starts_alone() -> None:
    assert launch.command("ray", ["10.0.0.1", "10.0.0.2"], "/s")[0] == sys.executable


def test_the_child_sees_the_gpus_of_its_ranks_in_their_order_and_no_leftovers_of_ray() -> None:
    base = {"CUDA_VISIBLE_DEVICES": "4,5,6,7", "TLLM_DISABLE_MPI": "1", "HOME": "/h"}
    given = launch.environment(base, [2, 0], "mark", several_nodes=False)
    assert given == {"CUDA_VISIBLE_DEVICES": "6,4", "HOME": "/h", launch.MARK: "mark"}
    assert launch.environment({}, [2, 0], "mark", several_nodes=False)["CUDA_VISIBLE_DEVICES"] == "2,0"
    assert "CUDA_VISIBLE_DEVICES" not in launch.environment({}, [0], "mark", several_nodes=True)


def test_marks_tell_ranks_and_their_engines_apart() -> None:
    rank = launch.mark_of("nats://a", "n-0")
    assert launch.mark_of("nats://a", "n-0", "p1").startswith(rank)
    assert not launch.mark_of("nats://a", "n-0", "1.10").startswith(launch.mark_of("nats://a", "n-0", "1.1"))
    assert launch.mark_of("nats://b", "n-0") != rank
    assert launch.mark_of("nats://a", "n-1") != rank
