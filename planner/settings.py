"""Settings of the planner: variables SPOTSERVE_PLANNER_<NAME>."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Final, Self

import msgspec

from planner.core.capacity import CapacityLimits
from planner.core.config_optimizer import Objective, Targets
from planner.errors import SettingsError

PREFIX: Final = "SPOTSERVE_PLANNER_"
_LIMITS: Final = CapacityLimits.__struct_fields__
_SLUG: Final = re.compile(r"[A-Za-z0-9_-]+")


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Raises SettingsError, which names the field."""

    model: str
    """Slug of the model that the fleet serves: part of every NATS name."""
    nats_url: str = "nats://127.0.0.1:4222"
    data: int | None = None
    """Pipelines that the operator asks for; None: the planner's choice. A target that the fleet cannot supply counts
    as the closest below; the same for `pipeline` (stages) and `tensor` (shards of a stage)."""
    pipeline: int | None = None
    tensor: int | None = None
    objective: Objective = Objective.LATENCY
    latency_s: float | None = None
    """What the objective `slo` must meet at the least cost."""
    max_batch: int = 16
    """Sequences that one pipeline decodes at once."""
    heartbeat_timeout_s: float = 3.0
    """An instance that is silent for so long is lost; it writes a byte every 0.5 s."""
    prepare_timeout_s: float = 120.0
    """A rank whose preparation stands still for so long, beyond what its transfers should take, hangs: it is left out
    for some minutes."""
    advisory: bool = False
    """Carry out only what keeps the fleet serving (the first plan; notices and losses of what serves); every other
    decision is explained and not acted upon."""
    min_spot: int | None = None
    """Floors and ceilings of the fleet, and prices of one instance. The planner publishes how many instances it wants
    once any of `max_spot` and `max_on_demand` is set; otherwise it takes the fleet as it comes."""
    max_spot: int | None = None
    min_on_demand: int | None = None
    max_on_demand: int | None = None
    candidate_pool: int | None = None
    """Spot instances to keep beyond those that are needed; they take over at once."""
    spot_usd_per_h: float | None = None
    on_demand_usd_per_h: float | None = None
    max_usd_per_h: float | None = None
    """Of the whole fleet."""
    log_level: str = "INFO"

    def __post_init__(self) -> None:
        if not _SLUG.fullmatch(self.model):
            raise SettingsError("model", f"{self.model!r} is not made of letters, digits, '-' and '_'")
        for field in ("data", "pipeline", "tensor", "max_batch"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise SettingsError(field, f"{value} is below 1")
        if self.heartbeat_timeout_s <= 0.5:
            raise SettingsError("heartbeat_timeout_s", f"{self.heartbeat_timeout_s} is not above the 0.5 s of the beat")
        if not self.prepare_timeout_s > 0:
            raise SettingsError("prepare_timeout_s", f"{self.prepare_timeout_s} is not above 0")
        if self.objective is Objective.SLO and not (self.latency_s or 0) > 0:
            raise SettingsError("latency_s", "the objective slo needs a latency above 0 to meet")
        self._check_limits()
        if self.log_level not in logging.getLevelNamesMapping():
            raise SettingsError("log_level", f"{self.log_level!r} is not a logging level")

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Self:
        """Raises SettingsError; an empty variable counts as not set."""
        given = {
            field: environ[PREFIX + field.upper()]
            for field in cls.__struct_fields__
            if environ.get(PREFIX + field.upper())
        }
        if "model" not in given:
            raise SettingsError("model", f"{PREFIX}MODEL is not set")
        if "log_level" in given:
            given["log_level"] = given["log_level"].upper()
        for field, value in given.items():
            _check_type(cls, field, value)
        return msgspec.convert(given, cls, strict=False)

    def _check_limits(self) -> None:
        if self.max_spot is None and self.max_on_demand is None:
            given = [name for name in _LIMITS if getattr(self, name) is not None]
            if given:
                raise SettingsError(given[0], "has no meaning without max_spot or max_on_demand")
        try:
            _ = self.limits
        except ValueError as error:
            field, _, reason = str(error).partition(": ")
            raise SettingsError(field, reason) from error

    @property
    def limits(self) -> CapacityLimits | None:
        """None: the operator has set no ceiling."""
        if self.max_spot is None and self.max_on_demand is None:
            return None
        given = {name: getattr(self, name) for name in _LIMITS if getattr(self, name) is not None}
        return CapacityLimits(**({"max_spot": 0} | given))

    @property
    def targets(self) -> Targets:
        return Targets(
            data=self.data,
            pipeline=self.pipeline,
            tensor=self.tensor,
            objective=self.objective,
            latency_s=self.latency_s,
            max_batch=self.max_batch,
        )


def _check_type(cls: type[Settings], field: str, value: str) -> None:
    wanted = next(f.type for f in msgspec.structs.fields(cls) if f.name == field)
    try:
        msgspec.convert(value, wanted, strict=False)
    except msgspec.ValidationError as error:
        raise SettingsError(field, f"{value!r}: {error}") from error
