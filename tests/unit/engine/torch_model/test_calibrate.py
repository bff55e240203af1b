from __future__ import annotations

import logging

import torch

from engine.backends.torch import calibrate as module
from engine.backends.torch.calibrate import load_or_calibrate

CPU = torch.device("cpu")


def test_a_profile_is_measured_once_and_again_when_it_is_damaged(tiny_model, tmp_path, monkeypatch, caplog):
    torch.set_num_threads(1)
    monkeypatch.setattr(module, "SECONDS_A_MEASUREMENT", 0.01)
    config = tiny_model("qwen2").checkpoint.config
    cache = tmp_path / "profiles"
    first = load_or_calibrate(cache, config, torch.float32, CPU, 16)
    assert first.batch_sizes == [1, 2, 4, 8]
    assert all(ms > 0 for ms in first.decode_layer_ms)
    assert all(ms >= 0 for ms in first.decode_head_ms)  # a difference; tiny here
    assert first.prefill_layer_ms_per_token > 0
    assert (first.device, first.dtype) == ("cpu", "float32")
    assert load_or_calibrate(cache, config, torch.float32, CPU, 16) == first
    assert load_or_calibrate(cache, config, torch.bfloat16, CPU, 16).dtype == "bfloat16"
    files = sorted(cache.glob("*.json"))
    assert len(files) == 2
    for path in files:
        path.write_bytes(b"{")
    with caplog.at_level(logging.WARNING):
        load_or_calibrate(cache, config, torch.float32, CPU, 16)
    assert "cannot be used" in caplog.text
    assert sorted(cache.glob("*.json")) == files


def test_a_cache_that_cannot_be_written_is_no_failure(tiny_model, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(module, "SECONDS_A_MEASUREMENT", 0.01)
    blocked = tmp_path / "file"
    blocked.write_text("")
    config = tiny_model("qwen2").checkpoint.config
    assert load_or_calibrate(blocked / "sub", config, torch.float32, CPU, 16).decode_layer_ms
    assert "not cached" in caplog.text


def test_a_larger_batch_is_never_faster() -> None:
    assert module._never_falling([2.6, 2.6, 2.7, 1.1]) == [1.1, 1.1, 1.1, 1.1]
    assert module._never_falling([1.0, 1.5, 1.2, 3.0]) == [1.0, 1.2, 1.2, 3.0]
