"""API keys of the gateway: the file that `spotserve keys` keeps, and when keys are required."""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import msgspec

from deploy.errors import CommandError, SettingError
from deploy.settings import UpSettings
from gateway.protocol import KeyFile, KeyRecord, hash_secret, is_loopback

SECRET_BYTES = 32


def key_file_of(settings: UpSettings) -> Path | None:
    """The keys that the gateway of this `up` asks for; None: it asks for none.

    Raises SettingError, also where keys are required and there are none.
    """
    if settings.no_auth:
        return None
    path = settings.api_keys or settings.default_api_keys
    if settings.api_keys is not None and not path.is_file():
        raise SettingError("--api-keys", str(path), "does not exist: `spotserve keys create NAME --file` makes one")
    if settings.api_keys is not None or (path.is_file() and read_keys(path).keys):
        return path
    if not is_loopback(settings.host):
        raise SettingError(
            "--host",
            settings.host,
            "is reachable from outside, and there are no API keys: make one with `spotserve keys create NAME`, "
            "or serve anybody with --no-auth",
        )
    return None


def read_keys(path: Path) -> KeyFile:
    """The keys of the file; none if it does not exist. Raises CommandError."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=KeyFile)
    except FileNotFoundError:
        return KeyFile()
    except OSError as error:
        raise CommandError(f"cannot read {path}: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise CommandError(f"{path} is not a file of API keys: {error}") from error


def create_key(path: Path, name: str, now_s: float, **limits: object) -> str:
    """Add a key to the file, which is made if need be; returns the key, which is kept nowhere. Raises CommandError."""
    if not name.strip() or not name.isprintable():
        raise CommandError(f"the name of a key must be printable, not {name[:40]!r}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror}") from error
    with _locked(path):
        return _create(path, name, now_s, limits)


def _create(path: Path, name: str, now_s: float, limits: Mapping[str, object]) -> str:
    file = read_keys(path)
    taken = {key.id for key in file.keys}
    id_ = next(one for one in iter(lambda: secrets.token_hex(4), None) if one not in taken)
    secret, salt = secrets.token_urlsafe(SECRET_BYTES), secrets.token_hex(16)
    fields = {"id": id_, "name": name, "salt": salt, "sha256": hash_secret(salt, secret), "created_s": round(now_s)}
    try:
        record = msgspec.convert({**fields, **limits}, KeyRecord)
    except msgspec.ValidationError as error:
        raise CommandError(str(error)) from error
    _write(path, KeyFile(keys=[*file.keys, record]))
    return f"sk-{id_}-{secret}"


def revoke_key(path: Path, id_or_name: str) -> KeyRecord:
    """Take a key out of the file; running gateways refuse it within a second. Raises CommandError."""
    with _locked(path):
        return _revoke(path, id_or_name)


def _revoke(path: Path, id_or_name: str) -> KeyRecord:
    file = read_keys(path)
    found = [key for key in file.keys if id_or_name in (key.id, key.name)]
    if len(found) != 1:
        problem = "no key" if not found else f"{len(found)} keys"
        raise CommandError(f"{problem} {id_or_name!r} in {path}: give an id that `spotserve keys list` shows")
    _write(path, KeyFile(keys=[key for key in file.keys if key is not found[0]]))
    return found[0]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One at a time reads, changes and writes the file: else the later would undo what the earlier did."""
    try:
        descriptor = os.open(path.parent, os.O_RDONLY)
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _write(path: Path, file: KeyFile) -> None:
    """So that a reader sees the old content or the new one, and nobody else sees it at all."""
    fresh = path.with_name(path.name + ".new")
    try:
        fresh.unlink(missing_ok=True)
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "wb") as out:  # noqa: PTH123  a descriptor
            out.write(msgspec.json.format(msgspec.json.encode(file), indent=2) + b"\n")
        fresh.replace(path)
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror}") from error
