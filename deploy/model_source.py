"""From what the user named to a model directory on this machine: the default model, a directory or a hub id."""

from __future__ import annotations

import json
import math
import re
import struct
from pathlib import Path
from typing import Any, Final

import httpx

from deploy.default_model import DEFAULT_MODEL, Say, fetch_default_model
from deploy.errors import (
    ModelDownloadError,
    ModelIncompleteError,
    ModelNotFoundError,
    UnsupportedModelError,
)

FAMILIES: Final = ("llama", "mistral", "qwen2", "qwen3")
HUB_FILES: Final = ["*.safetensors", "*.json", "*.jinja"]
MAX_HEADER_BYTES: Final = 100_000_000
"""The format's own limit; a damaged length must not make us read the whole file."""
_HUB_ID: Final = re.compile(r"[\w.-]+/[\w.-]+")


def resolve_model(model: str, cache: Path, say: Say) -> Path:
    """The checked directory of `model`: the default model's name, a directory, or a hub id `owner/name`.

    Fetches what is not here yet. Raises ModelNotFoundError, ModelIncompleteError, UnsupportedModelError or
    ModelDownloadError.
    """
    directory = Path(model).expanduser()
    if model == DEFAULT_MODEL:
        directory = fetch_default_model(cache, say)
    elif not directory.exists():
        if not _HUB_ID.fullmatch(model) or model.startswith("."):
            raise ModelNotFoundError(model, "no such directory, and not a hub id (owner/name)")
        directory = _fetch_from_hub(model, say)
    check_model(directory)
    return directory.resolve()


def check_model(directory: Path) -> None:
    """Raise ModelIncompleteError or UnsupportedModelError where the engine could not load `directory`."""
    family = _read_json(directory, "config.json").get("model_type", "")
    if family not in FAMILIES:
        raise UnsupportedModelError(str(directory), family, FAMILIES)
    if (directory / "model.safetensors.index.json").exists():
        files = set(_read_json(directory, "model.safetensors.index.json").get("weight_map", {}).values())
        for name in sorted(files):
            _require(directory, name)
    elif not any(directory.glob("*.safetensors")):
        raise ModelIncompleteError(str(directory), "*.safetensors", "no")
    _require(directory, "tokenizer.json")


def count_parameters(directory: Path) -> int:
    """Elements of all tensors, from the headers of the safetensors files; raises ModelIncompleteError."""
    return sum(_count_in_file(file) for file in sorted(directory.glob("*.safetensors")))


def _count_in_file(file: Path) -> int:
    try:
        with file.open("rb") as content:
            (num_header_bytes,) = struct.unpack("<Q", content.read(8))
            header = json.loads(content.read(min(num_header_bytes, MAX_HEADER_BYTES)))
        return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, struct.error) as error:
        raise ModelIncompleteError(str(file.parent), file.name, "a damaged") from error


def _require(directory: Path, name: str) -> None:
    if not (directory / name).is_file():
        raise ModelIncompleteError(str(directory), name, "no")


def _read_json(directory: Path, name: str) -> dict[str, Any]:
    _require(directory, name)
    try:
        content = json.loads((directory / name).read_bytes())
    except ValueError as error:
        raise ModelIncompleteError(str(directory), name, "an unreadable") from error
    if not isinstance(content, dict):
        raise ModelIncompleteError(str(directory), name, "an unreadable")
    return content


def _fetch_from_hub(model: str, say: Say) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    say(f"fetching {model} from the hub (safetensors and json files; kept in the hub's own cache)")
    try:
        return Path(snapshot_download(model, allow_patterns=HUB_FILES))
    except GatedRepoError as error:
        raise ModelNotFoundError(model, "the hub asks for a login: run `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise ModelNotFoundError(model, "no such directory, and the hub has no such model") from error
    except (HfHubHTTPError, httpx.HTTPError, OSError, ValueError) as error:
        reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise ModelDownloadError(model, "the hub", reason[0]) from error
