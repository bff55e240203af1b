"""What `spotserve up` can be told. Built from the command line's options; validated when built."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal, get_args

import msgspec

from deploy.default_model import DEFAULT_MODEL
from deploy.errors import SettingError
from planner.protocol import Market

DType = Literal["float32", "bfloat16", "float16"]
Reduction = Literal["fast", "fixed"]
Objective = Literal["latency", "throughput", "slo"]
Device = Literal["cpu", "cuda"]
Backend = Literal["torch", "tensorrt_llm"]
DTYPE_BYTES: Final[Mapping[str, int]] = {"float32": 4, "bfloat16": 2, "float16": 2}
AUTO: Final = "auto"
KEY_FILE_NAME: Final = "api-keys.json"


class UpSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Options of `up`. None: not given, so that the part's own default holds."""

    state_dir: Path
    cache_dir: Path
    model: str = DEFAULT_MODEL
    dtype: str = AUTO
    """auto, float32, bfloat16 or float16."""
    num_instances: int = 3
    ranks_per_instance: int = 1
    market: Market = Market.SPOT
    host: str = "127.0.0.1"
    port: int = 8000
    admin_port: int | None = None
    """Of metrics and health, on 127.0.0.1; None: a free one. Further workers have the ones after it."""
    gateway_workers: int = 1
    """Gateway processes on the one port."""
    api_keys: Path | None = None
    """File of the API keys; None: `default_api_keys`, if there is one."""
    no_auth: bool = False
    """No keys, whatever the address."""
    tls_cert: Path | None = None
    tls_key: Path | None = None
    nats_url: str | None = None
    """An external server; None: the embedded one."""
    max_model_len: int | None = None
    reduction: str | None = None
    pipelines: int | None = None
    """Upper targets of the planner: data, pipeline and tensor degree."""
    stages: int | None = None
    tensor: int | None = None
    objective: str | None = None
    target_latency_s: float | None = None
    """Of the objective slo."""
    advisory: bool = False
    autoscale: bool = False
    """Launch and release instances as the planner wants it."""
    max_instances: int | None = None
    max_on_demand: int | None = None
    """Of `max_instances`; the rest are spot."""
    max_batch: int | None = None
    rank_memory_mb: int | None = None
    device: str = "cpu"
    backend: str = "torch"
    """What runs the model; tensorrt_llm needs a GPU for each rank."""
    keep_state: bool = False
    """Go on with the JetStream store of the last `up`."""
    restart_delay_s: float = 0.5
    """Before the first restart of a part that ended by itself."""
    ready_timeout_s: float = 600.0

    def __post_init__(self) -> None:
        _one_of("--dtype", self.dtype, (AUTO, *get_args(DType)))
        _one_of("--device", self.device, get_args(Device))
        _one_of("--backend", self.backend, get_args(Backend))
        if self.backend != "torch" and self.reduction is not None:
            raise SettingError("--reduction", self.reduction, "goes with --backend torch")
        _one_of("--reduction", self.reduction, (None, *get_args(Reduction)))
        _one_of("--objective", self.objective, (None, *get_args(Objective)))
        _at_least("--instances", self.num_instances, 0)
        _at_least("--restart-delay-s", self.restart_delay_s, 0)
        for name in ("ranks_per_instance", "max_model_len", "pipelines", "stages", "tensor", "max_batch"):
            _at_least(f"--{name.replace('_', '-')}", getattr(self, name), 1)
        _at_least("--rank-memory-mb", self.rank_memory_mb, 1)
        if (self.objective == "slo") != (self.target_latency_s is not None):
            raise SettingError(
                "--target-latency", self.target_latency_s, "goes with --objective slo, and is needed there"
            )
        if self.target_latency_s is not None and not 0 < self.target_latency_s < math.inf:
            raise SettingError("--target-latency", self.target_latency_s, "must be seconds above 0")
        self._check_autoscale()
        self._check_gateway()
        if not 1 <= self.port <= 65535:
            raise SettingError("--port", self.port, "must be from 1 to 65535")

    def _check_gateway(self) -> None:
        _at_least("--gateway-workers", self.gateway_workers, 1)
        if self.admin_port is not None and not 1 <= self.admin_port <= 65536 - self.gateway_workers:
            raise SettingError("--admin-port", self.admin_port, "must be from 1 to 65535, with room for all workers")
        if self.no_auth and self.api_keys is not None:
            raise SettingError("--no-auth", self.no_auth, "goes without --api-keys")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise SettingError("--tls-cert", self.tls_cert, "goes with --tls-key: both or none")
        for name, path in (("--tls-cert", self.tls_cert), ("--tls-key", self.tls_key)):
            if path is not None and not path.is_file():
                raise SettingError(name, str(path), "does not exist")

    @property
    def default_api_keys(self) -> Path:
        """Where `spotserve keys` puts keys."""
        return self.state_dir / KEY_FILE_NAME

    def _check_autoscale(self) -> None:
        _at_least("--max-instances", self.max_instances, 1)
        _at_least("--on-demand", self.max_on_demand, 0)
        if self.autoscale != (self.max_instances is not None):
            raise SettingError("--max-instances", self.max_instances, "goes with --autoscale, and is needed there")
        if not self.autoscale and self.max_on_demand is not None:
            raise SettingError("--on-demand", self.max_on_demand, "goes with --autoscale")
        if self.max_instances is not None and (self.max_on_demand or 0) > self.max_instances:
            raise SettingError(
                "--on-demand", self.max_on_demand, f"must be {self.max_instances} (--max-instances) or less"
            )

    @property
    def uses_gpus(self) -> bool:
        return self.backend == "tensorrt_llm" or self.device == "cuda"

    @property
    def served_model_name(self) -> str:
        """The `model` of the HTTP API: the name as it was given, of a directory its last part."""
        path = Path(self.model).expanduser()
        return path.resolve().name if path.is_dir() else self.model

    @property
    def model_slug(self) -> str:
        """The model in NATS subjects and stream names."""
        return re.sub(r"[^A-Za-z0-9_-]+", "-", self.served_model_name).strip("-") or "model"


def default_state_dir(environ: Mapping[str, str]) -> Path:
    """`$XDG_STATE_HOME/spotserve`, else `~/.local/state/spotserve`."""
    home = environ.get("XDG_STATE_HOME")
    return (Path(home).expanduser() if home else Path.home() / ".local" / "state") / "spotserve"


def restart_delay_s(environ: Mapping[str, str]) -> float:
    """`SPOTSERVE_UP_RESTART_DELAY_S`, a setting for tests that want a part to stay away for a while."""
    text = environ.get("SPOTSERVE_UP_RESTART_DELAY_S", "0.5")
    try:
        delay_s = float(text)
    except ValueError:
        delay_s = math.nan
    if not 0 <= delay_s < math.inf:
        raise SettingError("SPOTSERVE_UP_RESTART_DELAY_S", text, "must be seconds, 0 or more")
    return delay_s


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise SettingError(name, value, f"must be one of {', '.join(str(one) for one in allowed if one)}")


def _at_least(name: str, value: float | None, least: int) -> None:
    if value is not None and value < least:
        raise SettingError(name, value, f"must be {least} or more")
