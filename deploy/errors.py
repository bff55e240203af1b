"""What goes wrong when a fleet is started or commanded; every message is one line that says what to do.

DeployError
├── ModelError
│   ├── ModelNotFoundError
│   ├── ModelIncompleteError
│   ├── UnsupportedModelError
│   └── ModelDownloadError
├── PortTakenError
├── NotEnoughMemoryError
├── NatsServerMissingError
├── NatsUnreachableError
├── AlreadyRunningError
├── NotRunningError
├── PartFailedError
├── CommandError
└── SettingError
"""

from __future__ import annotations

from pathlib import Path


class DeployError(Exception):
    """Base; the command line prints the message and exits with 2."""


class ModelError(DeployError):
    """The model cannot be served; `model` is what the user named."""

    def __init__(self, model: str, message: str) -> None:
        super().__init__(message)
        self.model = model


class ModelNotFoundError(ModelError):
    """Neither a directory nor a hub id that exists."""

    def __init__(self, model: str, detail: str) -> None:
        super().__init__(model, f"no model {model!r}: {detail}")


class ModelIncompleteError(ModelError):
    """A file of the model directory is missing or cannot be read."""

    def __init__(self, model: str, file: str, detail: str) -> None:
        super().__init__(
            model, f"the model directory {model} has {detail} {file}: give a complete Hugging Face directory"
        )
        self.file = file


class UnsupportedModelError(ModelError):
    """config.json names a family that the engine cannot run."""

    def __init__(self, model: str, family: str, supported: tuple[str, ...]) -> None:
        super().__init__(
            model,
            f"{model} is of the family {family!r} (model_type in config.json); SpotServe serves {', '.join(supported)}",
        )
        self.family = family


class ModelDownloadError(ModelError):
    """The registry or the hub did not give the model."""

    def __init__(self, model: str, source: str, detail: str) -> None:
        super().__init__(
            model,
            f"cannot fetch {model} from {source}: {detail}; check the network and the registry settings, "
            "or give a local directory with --model",
        )
        self.source = source


class PortTakenError(DeployError):
    def __init__(self, host: str, port: int) -> None:
        super().__init__(f"port {port} on {host} is taken: stop what listens there, or choose another with --port")
        self.port = port


class NotEnoughMemoryError(DeployError):
    """An estimate, made before anything is started."""

    def __init__(self, needed_bytes: int, available_bytes: int, num_ranks: int) -> None:
        super().__init__(
            f"too little memory: {num_ranks} rank(s) of this model need about {needed_bytes / 1e9:.1f} GB, "
            f"{available_bytes / 1e9:.1f} GB are available: use fewer --instances, --dtype bfloat16, "
            "or a smaller --model"
        )
        self.needed_bytes = needed_bytes
        self.available_bytes = available_bytes


class NatsServerMissingError(DeployError):
    def __init__(self) -> None:
        super().__init__("no nats-server here: run `make setup`, or give a running one with --nats-url")


class NatsUnreachableError(DeployError):
    def __init__(self, url: str, detail: str) -> None:
        super().__init__(f"cannot reach NATS at {url}: {detail}; check that the server runs")
        self.url = url


class AlreadyRunningError(DeployError):
    def __init__(self, pid: str, state_dir: Path) -> None:
        super().__init__(f"another `spotserve up` (pid {pid}) uses {state_dir}: stop it, or give another --state-dir")
        self.pid = pid


class NotRunningError(DeployError):
    def __init__(self, state_dir: Path) -> None:
        super().__init__(
            f"no `spotserve up` is running in {state_dir}: start one with `spotserve up`, or give its --state-dir"
        )
        self.state_dir = state_dir


class PartFailedError(DeployError):
    """A part that must be there for the start has exited or has not become ready."""

    def __init__(self, part: str, detail: str, log: Path) -> None:
        super().__init__(f"{part} {detail}; its log: {log}")
        self.part = part
        self.log = log


class CommandError(DeployError):
    """The supervisor, the planner or the gateway refused a command, or did not answer."""


class SettingError(DeployError):
    def __init__(self, name: str, value: object, detail: str) -> None:
        super().__init__(f"{name} {value!r}: {detail}")
        self.name = name
