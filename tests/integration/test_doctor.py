"""`spotserve doctor`, as a user runs it: with the double of TensorRT-LLM, and on a machine without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from trtllm_double.control import control

from engine.backends.tensorrt_llm.processes import is_alive
from tests.tiny_model import make_tiny_model

DOUBLES = Path(__file__).parents[1] / "doubles"


@pytest.fixture(autouse=True)
def double(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRTLLM_DOUBLE_DIR", str(tmp_path / "double"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def doctor(*options: str, with_double: bool = True) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHONPATH": str(DOUBLES) if with_double else "", "SPOTSERVE_DOCTOR_PATIENCE": "0.3"}
    return subprocess.run(
        [sys.executable, "-m", "deploy", "doctor", *options],
        env=environ,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def found(report: Path) -> dict[str, dict[str, Any]]:
    return {finding["name"]: finding for finding in json.loads(report.read_text())["findings"]}


def test_all_questions_are_answered_by_the_double(tmp_path: Path) -> None:
    control.set(num_gpus=2, step_s=0.001)
    model = make_tiny_model(tmp_path / "tiny")
    report = tmp_path / "report.json"
    done = doctor("--backend", "tensorrt_llm", "--model", str(model), "--json", str(report))
    findings = found(report)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\n") == len(findings) + 1
    expected = {
        "generate_async.order",
        "shutdown.pending",
        "abort.waiting",
        "reuse.cancelled",
        "seed.repeats",
        "logprobs.0",
        "basics.start",
        "ray.actor_death",
        "package.hang_detector",
        "connector.serves",
        "connector.layout",
        "processor.overlap_lag",
        "dead_worker.stream",
        "tensor.resumes",
        "pipeline.resumes",
    }
    assert expected <= findings.keys()
    assert findings["dead_worker.stream"]["seen"] == "silence"
    assert findings["connector.layout"]["outcome"] == "ok"
    assert "strides" in findings["connector.layout"]["seen"]
    assert findings["dead_worker.shutdown"]["seen"].startswith("hangs")
    assert findings["shutdown.pending"]["seen"].startswith("it waits for ever")
    assert not control.journal("end_id_given")
    pids = [pid for entry in control.journal("ready") for pid in entry["workers"]]
    assert not [pid for pid in pids if is_alive(pid)]


def test_what_differs_is_said_with_what_was_seen(tmp_path: Path) -> None:
    control.set(num_gpus=1, step_s=0.001, fault_starts=[1], request_error_after=20, fail_phase="kv", fail_starts=[2, 3])
    model = make_tiny_model(tmp_path / "tiny")
    report = tmp_path / "report.json"
    done = doctor("--backend", "tensorrt_llm", "--model", str(model), "--json", str(report))
    findings = found(report)
    assert done.returncode == 1
    assert "Traceback" not in done.stdout
    assert findings["greedy"]["outcome"] == "failed"
    assert "RequestError" in findings["greedy"]["seen"]
    assert "no room for the KV cache" in findings["restart.start"]["seen"]
    assert findings["tensor"]["outcome"] == "skipped"


def test_a_wrong_version_is_refused_with_the_reason(tmp_path: Path) -> None:
    control.set(version="1.2.0")
    report = tmp_path / "report.json"
    model = make_tiny_model(tmp_path / "tiny")
    done = doctor("--backend", "tensorrt_llm", "--model", str(model), "--json", str(report))
    assert done.returncode == 1
    assert "corrupts the KV cache" in found(report)["basics.start"]["seen"]


@pytest.mark.parametrize("with_double", [False, True])
def test_without_a_gpu_it_says_what_is_missing(tmp_path: Path, with_double: bool) -> None:
    control.set(num_gpus=0)
    report = tmp_path / "report.json"
    model = make_tiny_model(tmp_path / "tiny")
    done = doctor("--backend", "tensorrt_llm", "--model", str(model), "--json", str(report), with_double=with_double)
    assert done.returncode == 1
    assert done.stderr == ""
    missing = {name for name, finding in found(report).items() if finding["outcome"] == "missing"}
    assert missing == ({"driver"} if with_double else {"nvml", "tensorrt_llm"})


def test_torch_is_looked_at_too(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    done = doctor("--json", str(report), "--model", str(make_tiny_model(tmp_path / "tiny")))
    assert done.returncode == 0, done.stdout
    assert found(report)["forward.cpu.float32"]["outcome"] == "ok"
    assert "6 layers" in found(report)["model"]["seen"]


@pytest.mark.parametrize(
    ("options", "words"),
    [(("--backend", "vllm"), "torch, tensorrt_llm"), (("--json", "/nowhere/at/all.json"), "does not exist")],
)
def test_wrong_options_are_one_line(options: tuple[str, str], words: str) -> None:
    done = doctor(*options)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
