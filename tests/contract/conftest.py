from __future__ import annotations

from pathlib import Path

import pytest

from engine.backends.torch.backend import TorchBackend
from engine.settings import EngineSettings
from tests.contract.fleet import MakeBackend
from tests.tiny_model import make_tiny_model


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(params=["torch"])
def make_backend(request: pytest.FixtureRequest, model_dir: Path) -> MakeBackend:
    """One entry for each backend that exists."""

    def make(rank: str) -> TorchBackend:
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

    return make
