from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from trtllm_double.control import control

from engine.backends.base import Backend
from engine.backends.torch.backend import TorchBackend
from engine.settings import EngineSettings
from tests.contract.fleet import MakeBackend
from tests.tiny_model import make_tiny_model

DOUBLES = Path(__file__).parents[1] / "doubles"
NAMES = ["a", "b", "c", "d", "e", "f", "oracle"]


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def make_torch(model_dir: Path) -> MakeBackend:
    def make(rank: str) -> Backend:
        settings = EngineSettings(
            nats_url="nats://unused",
            model="tiny",
            model_dir=model_dir,
            instance=rank,
            reduction="fixed",
            kv_transfer="always",
            cache_dir=model_dir.parent / "cache",
            max_step_tokens=16,  # Prompts come in chunks.
        )
        return TorchBackend(settings, rank)

    return MakeBackend("torch", make)


@pytest.fixture
def make_tensorrt(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeBackend:
    """The TensorRT-LLM backend with the double of the package: one instance whose ranks are its GPUs."""
    return with_double(model_dir, tmp_path, monkeypatch)


@pytest.fixture
def make_tensorrt_with_connector(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeBackend:
    """The same with the KV connector."""
    make = with_double(model_dir, tmp_path, monkeypatch, kv_connector=True)
    monkeypatch.delenv("TRTLLM_DOUBLE_SWITCHES")
    return make


@pytest.fixture(params=["mpi", "ray"])
def make_tensorrt_over_nodes(
    request: pytest.FixtureRequest, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> MakeBackend:
    """Each rank is the one GPU of its instance; engines over several are started by a launcher, or by Ray."""
    monkeypatch.setenv("PATH", f"{DOUBLES / 'bin'}{os.pathsep}{os.environ['PATH']}")
    make = with_double(model_dir, tmp_path, monkeypatch, multi_node=request.param)

    def instance_of(rank: str) -> str:
        return f"node-of-{rank}"

    return replace(make, instance_of=instance_of, host_of=lambda rank: f"127.0.0.{int(rank[-1]) + 1}")


def with_double(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> MakeBackend:
    from engine.backends.tensorrt_llm.backend import TensorrtBackend

    monkeypatch.setenv("TRTLLM_DOUBLE_DIR", str(tmp_path / "double"))
    monkeypatch.setenv("PYTHONPATH", f"{DOUBLES}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("TRTLLM_DOUBLE_SWITCHES", '{"with_torch": false}')
    control.set(num_gpus=len(NAMES))
    (tmp_path / "store").mkdir()

    def make(rank: str) -> Backend:
        settings = EngineSettings(
            nats_url=f"nats://{tmp_path}",
            model="tiny",
            model_dir=model_dir,
            instance=f"node-of-{rank}" if "multi_node" in options else "node",
            num_ranks=len(NAMES),
            backend="tensorrt_llm",
            device="cuda",
            store_dir=tmp_path / "store",
            shutdown_timeout_s=2.0,
            gpu_free_timeout_s=10.0,
            engine_start_timeout_s=60.0,
            progress_timeout_s=2.0,
            **options,
        )
        return TensorrtBackend(settings, rank)

    return MakeBackend(
        "tensorrt_llm", make, lambda name: f"node-{NAMES.index(name)}", lambda rank: "node", moves_kv=False
    )


@pytest.fixture
def with_torch(make_tensorrt: MakeBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines take their weights through our loader, out of shared memory, and run logits processors."""
    monkeypatch.delenv("TRTLLM_DOUBLE_SWITCHES")


@pytest.fixture
def make_backend(make_torch: MakeBackend) -> MakeBackend:
    """For what only a backend can do that runs the model itself."""
    return make_torch


@pytest.fixture(params=["torch", "tensorrt_llm"])
def any_backend(request: pytest.FixtureRequest) -> MakeBackend:
    """For what each backend must do."""
    fixture: MakeBackend = request.getfixturevalue(
        {"torch": "make_torch", "tensorrt_llm": "make_tensorrt"}[request.param]
    )
    return fixture
