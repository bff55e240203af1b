"""Settings of the gateway, from variables SPOTSERVE_GATEWAY_<NAME>."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import get_type_hints

import msgspec

from gateway.core.tools.formats import FORMATS
from gateway.errors import SettingsError

_PREFIX = "SPOTSERVE_GATEWAY_"
_SUBJECT_TOKEN = re.compile(r"[A-Za-z0-9_-]+")


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What a gateway must know. Durations in seconds; `from_env` raises SettingsError naming the variable."""

    model_dir: str
    """Holds tokenizer.json, tokenizer_config.json and config.json."""
    model: str
    """The slug in the NATS subjects."""
    gateway_id: str
    """Its own token in the subjects; unique among the gateways of the model."""
    host: str = "127.0.0.1"
    port: int = 8000
    nats_url: str = "nats://127.0.0.1:4222"
    served_model_name: str = ""
    """As clients name the model; empty: the name of its directory."""
    max_queue: int = 256
    """Choices that may wait for a pipeline; more get 429."""
    request_timeout_s: float = 600.0
    queue_timeout_s: float = 60.0
    """A new request waits this long for room while there are pipelines ..."""
    no_pipeline_timeout_s: float = 300.0
    """... and this long while there is none."""
    max_model_len: int = 0
    """Prompt and answer together, in tokens; 0: what the plan or config.json says."""
    drain_s: float = 30.0
    """What running requests get after SIGTERM."""
    keep_alive_s: float = 0.0
    """Send an SSE comment after this silence; 0: never (some clients cannot read them)."""

    tool_format: str = "auto"
    """How the model writes tool calls: hermes, llama3_json, mistral; auto: as its chat template tells."""
    reasoning: str = "auto"
    """think: text in <think> tags is reasoning; none: it is content; auto: think if the chat template has the tag."""

    def __post_init__(self) -> None:
        for name in ("model", "gateway_id"):
            if not _SUBJECT_TOKEN.fullmatch(getattr(self, name)):
                raise SettingsError(_PREFIX + name.upper(), "must be letters, digits, `-` and `_`")
        if not self.model_dir:
            raise SettingsError(_PREFIX + "MODEL_DIR", "is required")
        if not 0 <= self.port <= 65535:
            raise SettingsError(_PREFIX + "PORT", f"must be 0 to 65535, not {self.port}")
        for name, known in (("tool_format", ("auto", *FORMATS)), ("reasoning", ("auto", "think", "none"))):
            if getattr(self, name) not in known:
                raise SettingsError(_PREFIX + name.upper(), f"must be one of {', '.join(known)}")
        for name in ("max_queue", "request_timeout_s", "queue_timeout_s", "no_pipeline_timeout_s"):
            if getattr(self, name) <= 0:
                raise SettingsError(_PREFIX + name.upper(), "must be greater than 0")
        for name in ("max_model_len", "drain_s", "keep_alive_s"):
            if getattr(self, name) < 0:
                raise SettingsError(_PREFIX + name.upper(), "must not be negative")

    @classmethod
    def from_env(cls, environ: Mapping[str, str], *, gateway_id: str) -> Settings:
        """Settings of `environ`; `gateway_id` is for an environment that names none.

        Raises SettingsError naming the variable.
        """
        values: dict[str, object] = {"gateway_id": gateway_id, "model_dir": "", "model": ""}
        for name, type_ in get_type_hints(cls).items():
            text = environ.get(_PREFIX + name.upper())
            if not text:
                continue
            try:
                values[name] = msgspec.convert(text, type_, strict=False)
            except msgspec.ValidationError as error:
                raise SettingsError(_PREFIX + name.upper(), f"{error} ({text[:80]!r})") from error
        return cls(**values)  # type: ignore[arg-type] # each value was converted to its field's type
