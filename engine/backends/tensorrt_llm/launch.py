"""Command line and environment of an engine's process."""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final, Literal

from engine.backends.tensorrt_llm import gpus

CHILD_MODULE: Final = "engine.backends.tensorrt_llm.child"
MARK: Final = "TLLM_SPOTSERVE_ENGINE"
"""Every process of an engine inherits it, also one that has left its process group: MPI hands on what begins so."""
Launcher = Literal["mpi", "ray"]


def mark_of(nats_url: str, rank: str, pipeline: str = "") -> str:
    """Unique to the rank on this machine; with `pipeline` to one of its engines, which begins with the former."""
    owner = f"{hashlib.sha256(f'{nats_url} {rank}'.encode()).hexdigest()[:16]}:"
    return (
        f"{owner}{pipeline};" if pipeline else owner
    )  # The end counts: the mark of 1.1 is not how that of 1.10 begins.


def command(launcher: Launcher, hosts: Sequence[str], socket_path: str) -> list[str]:
    """The child's command. `hosts`: of each world rank, in order; several of them need a launcher.

    mpi: one task a GPU under `trtllm-llmapi-launch`, whose rank 0 runs the child and whose others serve it. ray: the
    child alone, since TensorRT-LLM starts its ranks on a Ray cluster that is there already.
    """
    child = [sys.executable, "-m", CHILD_MODULE, socket_path]
    if launcher == "ray" or len(set(hosts)) == 1:
        return child
    slots = Counter(hosts)
    named = ",".join(f"{host}:{slots[host]}" for host in dict.fromkeys(hosts))
    mpirun = ["mpirun", "-n", str(len(hosts)), "--host", named, "--map-by", "slot", "-x", MARK, "-x", "PYTHONPATH"]
    return [*mpirun, "trtllm-llmapi-launch", *child]


def environment(base: Mapping[str, str], devices: Sequence[int], mark: str, *, several_nodes: bool) -> dict[str, str]:
    """Of the child. GPUs in the order of the world's ranks; over several nodes each node has its own, all of them."""
    given = {**base, MARK: mark}
    for name in ("TLLM_DISABLE_MPI", "RAY_LOCAL_WORLD_SIZE"):
        given.pop(name, None)
    if not several_nodes:
        given["CUDA_VISIBLE_DEVICES"] = ",".join(gpus.names(devices, base))
    return given
