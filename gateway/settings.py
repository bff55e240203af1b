"""Settings of the gateway, from variables SPOTSERVE_GATEWAY_<NAME>."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import get_type_hints

import msgspec

from gateway.core.tools.formats import FORMATS
from gateway.errors import SettingsError
from gateway.protocol import is_loopback

_PREFIX = "SPOTSERVE_GATEWAY_"
_POSITIVE = (
    "max_queue",
    "max_body_bytes",
    "request_timeout_s",
    "queue_timeout_s",
    "no_pipeline_timeout_s",
    "slow_reader_timeout_s",
    "max_broken_pipelines",
    "queue_aging_s",
)
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
    max_body_bytes: int = 8 * 1024 * 1024
    """Of a request; more gets 413."""
    request_timeout_s: float = 600.0
    """From arrival to the last token; the header x-request-timeout-s can make it shorter."""
    queue_timeout_s: float = 60.0
    """A new request waits this long for room while there are pipelines ..."""
    no_pipeline_timeout_s: float = 300.0
    """... and this long while there is none."""
    max_model_len: int = 0
    """Prompt and answer together, in tokens; 0: what the plan or config.json says."""
    drain_s: float = 30.0
    """What running requests get after SIGTERM."""
    slow_reader_timeout_s: float = 30.0
    """A client that does not read its stream for so long is cut off."""
    max_broken_pipelines: int = 16
    """A request fails when so many pipelines have broken under it without notice."""
    queue_aging_s: float = 15.0
    """Waiting so long lifts a key by one priority class, and a request past its key's others."""
    api_keys: str = ""
    """File of the API keys (`spotserve keys`); empty: none are asked for, on the loopback address only."""
    no_auth: bool = False
    """Serve any address without API keys."""
    tls_cert: str = ""
    """PEM files of the certificate chain ..."""
    tls_key: str = ""
    """... and of its key: HTTPS."""
    admin_host: str = "127.0.0.1"
    admin_port: int = 0
    """Of /metrics, /health and /ready without TLS and without keys; 0: any free one."""
    public_metrics: bool = True
    """GET /metrics on the main port too: load tools look for it there."""
    reuse_port: bool = False
    """Other gateway processes listen on the same port."""
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
        for name in ("port", "admin_port"):
            if not 0 <= getattr(self, name) <= 65535:
                raise SettingsError(_PREFIX + name.upper(), f"must be 0 to 65535, not {getattr(self, name)}")
        for name, known in (("tool_format", ("auto", *FORMATS)), ("reasoning", ("auto", "think", "none"))):
            if getattr(self, name) not in known:
                raise SettingsError(_PREFIX + name.upper(), f"must be one of {', '.join(known)}")
        self._check_access()
        for name in _POSITIVE:
            if getattr(self, name) <= 0:
                raise SettingsError(_PREFIX + name.upper(), "must be greater than 0")
        for name in ("max_model_len", "drain_s", "keep_alive_s"):
            if getattr(self, name) < 0:
                raise SettingsError(_PREFIX + name.upper(), "must not be negative")

    def _check_access(self) -> None:
        if bool(self.tls_cert) != bool(self.tls_key):
            raise SettingsError(_PREFIX + "TLS_CERT", "goes with TLS_KEY: both or none")
        if not is_loopback(self.host) and not self.api_keys and not self.no_auth:
            raise SettingsError(
                _PREFIX + "HOST",
                f"{self.host or 'every address'} is reachable from outside and no API keys are set: "
                "set API_KEYS to a file (`spotserve keys create` makes one), or NO_AUTH=1 to serve anybody",
            )

    @property
    def model_name(self) -> str:
        """As clients name the model."""
        return self.served_model_name or Path(self.model_dir).resolve().name

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
