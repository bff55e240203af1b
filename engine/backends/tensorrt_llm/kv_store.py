"""KV blocks in an instance's memory, found by what they hold; written and read by the connector in an engine's ranks.

A block's key chains the tokens before it: two prompts that share a block at another place share nothing. Its root
names the model, dtype, block size, degrees and cache salt; the rank is part of the file's name, since each rank holds
its slice alone. So an engine of another shape finds nothing, and computes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from engine.backends.tensorrt_llm.wire import EngineSpec

KV_VARIABLE: Final = "TLLM_SPOTSERVE_KV"
"""Environment of the engine's ranks: MPI hands on what begins so."""


class KvIdentity(msgspec.Struct, frozen=True):
    """What a block's bytes depend on, beside its tokens; and where it is kept."""

    directory: str
    limit_bytes: int
    model: str
    dtype: str
    block_tokens: int
    tensor: int
    layers: list[int]

    @property
    def num_ranks(self) -> int:
        return self.tensor * len(self.layers)

    def root(self, salt: object) -> bytes:
        """The key before the first block."""
        facts = [self.model, self.dtype, self.block_tokens, self.tensor, self.layers, str(salt)]
        return hashlib.sha256(msgspec.json.encode(facts)).digest()


def kv_environment(spec: EngineSpec) -> str:
    """Value of `KV_VARIABLE`."""
    model = Path(spec.model_dir)
    stamps = [f"{path.name} {path.stat().st_mtime_ns}" for path in sorted(model.glob("*.json"))]
    identity = KvIdentity(
        directory=spec.kv_dir,
        limit_bytes=spec.kv_limit_bytes,
        model=" ".join([str(model), *stamps]),
        dtype=spec.dtype,
        block_tokens=spec.block_tokens,
        tensor=spec.tensor,
        layers=spec.layers,
    )
    return msgspec.json.encode(identity).decode()


def read_identity() -> KvIdentity:
    """Of the engine that this process is a part of. Raises KeyError where the connector is off."""
    return msgspec.json.decode(os.environ[KV_VARIABLE], type=KvIdentity)


def chain(root: bytes, tokens: Sequence[int], block_tokens: int) -> list[str]:
    """Keys of the full blocks of `tokens`, each of which stands for everything before it too."""
    keys, parent = [], root
    for first in range(0, len(tokens) - block_tokens + 1, block_tokens):
        block = b"".join(token.to_bytes(4, "little") for token in tokens[first : first + block_tokens])
        parent = hashlib.sha256(parent + block).digest()
        keys.append(parent.hex())
    return keys


class KvFiles:
    """A file for each (block, rank). Files appear whole, and the oldest go when there are too many bytes."""

    def __init__(self, identity: KvIdentity) -> None:
        self._identity = identity
        self._directory = Path(identity.directory)
        self._directory.mkdir(parents=True, exist_ok=True)

    def has(self, key: str) -> bool:
        """Whether every rank's part is there."""
        return all(self._path(key, rank).exists() for rank in range(self._identity.num_ranks))

    def read(self, key: str, rank: int) -> bytes | None:
        with contextlib.suppress(OSError):
            path = self._path(key, rank)
            data = path.read_bytes()
            path.touch()
            return data
        return None

    def write(self, key: str, rank: int, data: bytes) -> None:
        """Keep it; a full disk only means that it is computed again."""
        path = self._path(key, rank)
        if path.exists():
            return
        partial = path.with_suffix(f".{os.getpid()}")
        with contextlib.suppress(OSError):
            partial.write_bytes(data)
            partial.replace(path)
            self._drop_oldest(rank)

    def note_layout(self, rank: int, facts: str) -> None:
        """For `spotserve doctor`: how TensorRT-LLM lays a rank's KV cache out."""
        with contextlib.suppress(OSError):
            (self._directory / f"layout-{rank}").write_text(facts)

    def forget(self, key: str, rank: int) -> None:
        """It cannot be used; nor can those behind it, since they are only looked for after it."""
        self._path(key, rank).unlink(missing_ok=True)

    def _path(self, key: str, rank: int) -> Path:
        return self._directory / f"{key}-{rank}.kv"

    def _drop_oldest(self, rank: int) -> None:
        """Each rank keeps to its share of the limit."""
        entries = []
        for path in self._directory.glob(f"*-{rank}.kv"):
            with contextlib.suppress(OSError):
                entries.append((path.stat().st_mtime_ns, path.stat().st_size, path))
        excess = sum(size for _, size, _ in entries) - self._identity.limit_bytes // self._identity.num_ranks
        for _, size, path in sorted(entries):
            if excess <= 0:
                return
            path.unlink(missing_ok=True)
            excess -= size
