"""Which programs make up a fleet on one machine: their command lines and environments. Pure."""

from __future__ import annotations

import socket
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

import msgspec

from deploy.process import Program
from deploy.settings import UpSettings
from planner.protocol import Market

MIB = 2**20
DRAIN_S = 1


class Commands(msgspec.Struct, frozen=True, kw_only=True):
    """The command line of each part; tests put stand-ins here."""

    planner: tuple[str, ...] = (sys.executable, "-m", "planner")
    gateway: tuple[str, ...] = (sys.executable, "-m", "gateway")
    engine: tuple[str, ...] = (sys.executable, "-m", "engine")


def nats_program(binary: Path, port: int, store_dir: Path) -> Program:
    """The embedded server, on 127.0.0.1 alone."""
    options = ["--addr", "127.0.0.1", "--port", str(port), "--jetstream", "--store_dir", str(store_dir)]
    return Program(name="nats", command=(str(binary), *options))


def planner_program(commands: Commands, settings: UpSettings, nats_url: str) -> Program:
    """The planner, with the targets of `settings`."""
    environment = _environment(
        "PLANNER",
        nats_url=nats_url,
        model=settings.model_slug,
        data=settings.pipelines,
        pipeline=settings.stages,
        tensor=settings.tensor,
        objective=settings.objective,
        latency_s=settings.target_latency_s,
        advisory=settings.advisory or None,
        **_limits(settings),
        max_batch=settings.max_batch,
    )
    return Program(name="planner", command=commands.planner, environment=environment)


def _limits(settings: UpSettings) -> dict[str, int]:
    """Of the planner's fleet, where the supervisor follows what it wants."""
    if not settings.autoscale:
        return {}
    most, on_demand = settings.max_instances or 0, settings.max_on_demand or 0
    # One instance at least: an idle fleet must be able to answer its next request.
    floors = {"min_spot": 1} if most > on_demand else {"min_on_demand": 1}
    return {"max_spot": most - on_demand, "max_on_demand": on_demand, "candidate_pool": 0, **floors}


class GatewayWorker(msgspec.Struct, frozen=True, kw_only=True):
    """One of the gateway processes on the port."""

    number: int
    admin_port: int
    metrics_dir: Path
    """Where several of them add up their numbers."""
    key_file: Path | None

    @property
    def name(self) -> str:
        return "gateway" if self.number == 0 else f"gateway-{self.number}"


def gateway_program(
    commands: Commands, settings: UpSettings, nats_url: str, model_dir: Path, worker: GatewayWorker
) -> Program:
    """A gateway, listening where `settings` say."""
    several = settings.gateway_workers > 1
    environment = _environment(
        "GATEWAY",
        host=settings.host,
        port=settings.port,
        nats_url=nats_url,
        model=settings.model_slug,
        model_dir=model_dir,
        served_model_name=settings.served_model_name,
        max_model_len=settings.max_model_len,
        # The same after a restart: what keys have used is kept by gateway.
        gateway_id=f"up{zlib.crc32(f'{socket.gethostname()}:{settings.state_dir}'.encode()):08x}-{worker.number}",
        admin_port=worker.admin_port,
        api_keys=worker.key_file,
        no_auth=settings.no_auth or None,
        tls_cert=settings.tls_cert,
        tls_key=settings.tls_key,
        reuse_port=True if several else None,
        # Ctrl-C stops the instances as well: there is nothing to wait for.
        drain_s=DRAIN_S,
    )
    if several:
        environment |= {"PROMETHEUS_MULTIPROC_DIR": str(worker.metrics_dir)}
    return Program(name=worker.name, command=commands.gateway, environment=environment)


def engine_program(
    commands: Commands,
    settings: UpSettings,
    nats_url: str,
    model_dir: Path,
    dtype: str,
    instance: str,
    market: Market,
    gpus: Sequence[str] = (),
) -> Program:
    """One instance: the agent, which starts its ranks. `gpus`: those that it may use; none given: all."""
    environment = _environment(
        "ENGINE",
        nats_url=nats_url,
        model=settings.model_slug,
        model_dir=model_dir,
        instance=instance,
        market=market.value,
        num_ranks=settings.ranks_per_instance,
        dtype=dtype,
        device="cuda" if settings.uses_gpus else settings.device,
        backend=None if settings.backend == "torch" else settings.backend,
        max_model_len=settings.max_model_len,
        reduction=settings.reduction,
        rank_memory_bytes=None if settings.rank_memory_mb is None else settings.rank_memory_mb * MIB,
        cache_dir=settings.cache_dir,
    )
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    # Two threads on a core that another rank uses too are many times slower than one.
    environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return Program(name=instance, command=commands.engine, environment=environment)


def _environment(service: str, **options: object) -> dict[str, str]:
    """`SPOTSERVE_<SERVICE>_<NAME>` for each option that was given."""
    return {f"SPOTSERVE_{service}_{name.upper()}": str(value) for name, value in options.items() if value is not None}
