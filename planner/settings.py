"""Settings of the planner: variables SPOTSERVE_PLANNER_<NAME>."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Final, Self

import msgspec

from planner.core.config_optimizer import Objective, Targets
from planner.errors import SettingsError

PREFIX: Final = "SPOTSERVE_PLANNER_"
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

    @property
    def targets(self) -> Targets:
        return Targets(
            data=self.data,
            pipeline=self.pipeline,
            tensor=self.tensor,
            objective=self.objective,
            max_batch=self.max_batch,
        )


def _check_type(cls: type[Settings], field: str, value: str) -> None:
    wanted = next(f.type for f in msgspec.structs.fields(cls) if f.name == field)
    try:
        msgspec.convert(value, wanted, strict=False)
    except msgspec.ValidationError as error:
        raise SettingsError(field, f"{value!r}: {error}") from error
