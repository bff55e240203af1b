"""Whether this machine can run the torch backend: `python -m engine.backends.torch.doctor`."""

from __future__ import annotations

import importlib.metadata
import math
import sys
from pathlib import Path
from typing import Final

from engine.backends.findings import Finding, Findings, Outcome, run_doctor
from engine.errors import EngineError

PACKAGES: Final = ("numpy", "safetensors", "xxhash", "llguidance")


def check_packages(findings: Findings) -> None:
    """Versions of what the backend imports."""
    for package in PACKAGES:
        try:
            findings.add(Finding(package, Outcome.OK, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            findings.add(Finding(package, Outcome.MISSING, "is not installed: pip install 'spotserve[engine]'"))


def check_torch(findings: Findings) -> None:
    """Version, devices, the libraries between ranks, and a tiny forward pass on each kind of device."""
    try:
        import torch
    except ImportError as error:
        findings.add(Finding("torch", Outcome.MISSING, f"{error}: pip install 'spotserve[engine]'"))
        return
    findings.add(Finding("torch", Outcome.OK, torch.__version__))
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    findings.add(Finding("devices", Outcome.OK, ", ".join(["cpu", *gpus])))
    needed = "nccl" if gpus else "gloo"
    has_library = getattr(torch.distributed, f"is_{needed}_available")()
    outcome = Outcome.OK if has_library else Outcome.MISSING
    findings.add(Finding(needed, outcome, "there" if has_library else f"this torch was built without {needed}"))
    for device in ["cpu", *(["cuda"] if gpus else [])]:
        for dtype in (torch.float32, torch.bfloat16):
            name = f"forward.{device}.{str(dtype).removeprefix('torch.')}"
            try:
                deviation = _deviation(device, dtype)
            except RuntimeError as failure:
                findings.add(Finding(name, Outcome.FAILED, str(failure).partition("\n")[0]))
                continue
            is_good = deviation < (1e-4 if dtype is torch.float32 else 0.05)
            findings.add(
                Finding(
                    name, Outcome.OK if is_good else Outcome.FAILED, f"differs from float64 by {deviation:.1e} at most"
                )
            )


def _deviation(device: str, dtype: object) -> float:
    """A layer of attention against the same in float64: the largest relative difference."""
    import torch

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 16, 32, generator=generator, dtype=torch.float64) for _ in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert isinstance(dtype, torch.dtype)
    got = torch.nn.functional.scaled_dot_product_attention(
        q.to(device, dtype), k.to(device, dtype), v.to(device, dtype), is_causal=True
    )
    deviation = float((got.cpu().double() - expected).abs().max() / expected.abs().max())
    return math.inf if math.isnan(deviation) else deviation


def check_model(findings: Findings, model_dir: Path) -> None:
    """Whether the model's files are all there, and of a supported family."""
    from engine.backends.torch.checkpoint import Checkpoint

    try:
        config = Checkpoint(model_dir).config
    except (EngineError, OSError) as error:
        findings.add(Finding("model", Outcome.FAILED, str(error)))
        return
    shape = f"{config.num_layers} layers, {config.num_heads} heads, {config.num_kv_heads} KV heads"
    findings.add(Finding("model", Outcome.OK, f"{model_dir.name}: {shape}"))


def examine(findings: Findings, model_dir: Path | None) -> None:
    """Packages, torch, and the model if one is given."""
    check_packages(findings)
    check_torch(findings)
    if model_dir is not None and not findings.has(Outcome.MISSING):
        check_model(findings, model_dir)


def main(arguments: list[str] | None = None) -> int:
    """Examine and report; the exit code."""
    return run_doctor("torch", "a model directory to look at", examine, arguments)


if __name__ == "__main__":
    sys.exit(main())
