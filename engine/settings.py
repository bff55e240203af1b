"""Settings of an engine instance; only `__main__` reads the environment."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

import msgspec

from engine.errors import SettingError
from planner.protocol import Market

DtypeName = Literal["float32", "bfloat16", "float16"]
DeviceName = Literal["cpu", "cuda"]
Reduction = Literal["fast", "fixed"]
KvTransfer = Literal["auto", "always", "never"]
BackendName = Literal["torch", "tensorrt_llm"]
MultiNode = Literal["mpi", "ray"]

PREFIX = "SPOTSERVE_ENGINE_"
TENSORRT_DEFAULTS = {"dtype": "bfloat16", "device": "cuda", "kv_block_tokens": "32"}
"""What an unset variable means with the backend `tensorrt_llm`."""
_TOKEN = re.compile(r"[A-Za-z0-9_-]+")
"""What can stand between the dots of a NATS subject, and in the name of a KV bucket."""
_LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


class EngineSettings(msgspec.Struct, frozen=True, kw_only=True):
    """One instance and its ranks. Variables are `SPOTSERVE_ENGINE_<FIELD>`."""

    nats_url: str
    model: str
    """Slug of the model: the prefix of all subjects."""
    model_dir: Path
    instance: str
    market: Market = Market.SPOT
    num_ranks: int = 1
    host: str = "127.0.0.1"
    """Address on which the other instances reach this one."""
    dtype: DtypeName = "float32"
    device: DeviceName = "cpu"
    reduction: Reduction = "fast"
    """`fixed`: bit-identical results for every shape and batch, at some cost in speed."""
    max_model_len: int | None = None
    """None: what the model's config.json says."""
    kv_block_tokens: int = 16
    max_step_tokens: int = 256
    """Rows of one step: a long prompt is prefilled in chunks of at most this size."""
    rank_memory_bytes: int | None = None
    """For weights and KV of one rank. None: a quarter of the machine's memory, or 90 % of a GPU's."""
    num_threads: int = 1
    """Compute threads of a rank. On a busy CPU two are many times slower than one."""
    cache_dir: Path = Path("~/.cache/spotserve")
    arrange_margin_s: float = 2.0
    """A pipeline under notice stops this long before it would have to, in case the estimate is wrong."""
    parked_kv_s: float = 60.0
    """How long the KV of interrupted sequences is kept for others to pull."""
    kv_transfer: KvTransfer = "auto"
    """Whether an interrupted sequence's KV is pulled. auto: if the cost model says that is sooner than recompute."""
    prefix_caching: bool = True
    """Requests that begin alike share KV, also with those that have ended, as long as nobody needs its room."""
    log_level: str = "INFO"

    backend: BackendName = "torch"
    # What follows is for tensorrt_llm alone.
    store_dir: Path = Path("/dev/shm")  # noqa: S108 - shared memory is where the weights shall be
    """Where an instance keeps the model's weights between one engine and the next; as large as the model."""
    multi_node: MultiNode | None = None
    """How an engine over several instances starts its ranks; None: there are no such engines."""
    max_num_tokens: int | None = None
    """Tokens of one iteration. None: enough for a resumed prompt, up to 16384."""
    gpu_memory_fraction: float = 0.9
    """Of the memory that is free once the weights are in, for KV; the plan's number of blocks is the other limit."""
    cuda_graphs: bool = True
    autotuner: bool = True
    """Off: engines start sooner, and their kernels may be slower."""
    engine_start_timeout_s: float = 900.0
    """For the import of TensorRT-LLM, and again for building an engine."""
    shutdown_timeout_s: float = 10.0
    """After it the engine's processes are killed."""
    gpu_free_timeout_s: float = 30.0
    """How long a GPU may stay occupied after its engine has gone."""
    progress_timeout_s: float = 60.0
    """An engine with requests that gives no token for so long is dead."""
    kv_connector: bool = False
    """Keep KV blocks in host memory across engines of the same shape. Not validated on hardware."""
    kv_store_bytes: int = 8 << 30

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> EngineSettings:
        """Settings from `SPOTSERVE_ENGINE_*`.

        Raises:
            SettingError: a variable is missing, malformed or out of range.

        """
        given = {
            name: environ[PREFIX + name.upper()] for name in cls.__struct_fields__ if environ.get(PREFIX + name.upper())
        }
        for name in ("nats_url", "model", "model_dir", "instance"):
            if name not in given:
                raise SettingError(PREFIX + name.upper(), "is not set")
        if given.get("backend") == "tensorrt_llm":
            given = TENSORRT_DEFAULTS | given
        for name, value in given.items():
            _check_field(cls, name, value)
        settings = msgspec.convert(given, cls, strict=False, dec_hook=_decode)
        settings.validate()
        return settings

    def validate(self) -> None:
        """Check the ranges.

        Raises:
            SettingError: names the variable.

        """
        for name in ("num_ranks", "kv_block_tokens", "max_step_tokens", "num_threads"):
            if getattr(self, name) < 1:
                raise SettingError(PREFIX + name.upper(), "must be at least 1")
        for name in ("arrange_margin_s", "parked_kv_s", "shutdown_timeout_s", "gpu_free_timeout_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise SettingError(PREFIX + name.upper(), "must be at least 0, and finite")
        for name in ("max_model_len", "rank_memory_bytes", "max_num_tokens", "kv_store_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingError(PREFIX + name.upper(), "must be at least 1")
        for name in ("model", "instance"):
            if not _TOKEN.fullmatch(getattr(self, name)):
                raise SettingError(PREFIX + name.upper(), "must consist of letters, digits, - and _")
        if self.log_level.upper() not in _LOG_LEVELS:
            raise SettingError(PREFIX + "LOG_LEVEL", f"must be one of {', '.join(_LOG_LEVELS)}")
        self._validate_tensorrt()

    def _validate_tensorrt(self) -> None:
        for name in ("engine_start_timeout_s", "progress_timeout_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise SettingError(PREFIX + name.upper(), "must be above 0, and finite")
        if not 0 < self.gpu_memory_fraction < 1:
            raise SettingError(PREFIX + "GPU_MEMORY_FRACTION", "must be above 0 and below 1")

    def rank_id(self, index: int) -> str:
        return f"{self.instance}-{index}"


def _decode(kind: type, value: object) -> object:
    if kind is Path:
        return Path(str(value)).expanduser()
    raise NotImplementedError(kind)


def _check_field(cls: type[EngineSettings], name: str, value: str) -> None:
    field = next(f for f in msgspec.structs.fields(cls) if f.name == name)
    try:
        msgspec.convert(value, field.type, strict=False, dec_hook=_decode)
    except msgspec.ValidationError as error:
        allowed = get_args(field.type)
        hint = f" (one of {', '.join(map(str, allowed))})" if allowed and allowed[-1] is not type(None) else ""
        raise SettingError(PREFIX + name.upper(), f"{value!r} is not valid{hint}: {error}") from error
