"""What counts as a GPU that is in use, with the double of NVML."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.backends.tensorrt_llm import gpus
from engine.backends.tensorrt_llm.gpus import GpuState


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> list[GpuState]:
    """The states that are told one after the other; the last one stays."""
    told: list[GpuState] = []
    monkeypatch.setattr(gpus, "states", lambda _: [told.pop(0) if len(told) > 1 else told[0]])
    return told


def nobody(_: int) -> bool:
    return False


async def test_a_gpu_is_free_once_its_memory_is(one_gpu: list[GpuState]) -> None:
    one_gpu += [GpuState(100, 80, frozenset()), GpuState(100, 5, frozenset())]
    assert await gpus.wait_until_free(["0"], 5.0, nobody) is None


async def test_much_memory_in_use_is_told_whoever_has_it(one_gpu: list[GpuState]) -> None:
    one_gpu.append(GpuState(100 << 20, 80 << 20, frozenset()))
    assert await gpus.wait_until_free(["3"], 0.0, nobody) == "GPU 3: 80 MiB of 100 in use, by ?"


async def test_a_small_context_counts_only_if_it_is_of_the_engine_that_must_be_gone(one_gpu: list[GpuState]) -> None:
    one_gpu.append(GpuState(100, 1, frozenset({7})))
    assert await gpus.wait_until_free(["0"], 0.0, nobody) is None
    assert await gpus.wait_until_free(["0"], 0.0, lambda pid: pid == 7) is not None


def test_names_are_what_cuda_visible_devices_says() -> None:
    assert gpus.names([0, 2], {}) == ["0", "2"]
    assert gpus.names([1, 0], {"CUDA_VISIBLE_DEVICES": "4, GPU-aa"}) == ["GPU-aa", "4"]


def test_gpus_that_nvml_does_not_know_are_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRTLLM_DOUBLE_DIR", str(tmp_path))
    known = gpus.count()
    assert known is not None
    assert known > 0
    assert gpus.states(["0"]) is not None
    assert gpus.states([str(known)]) is None
