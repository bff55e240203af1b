"""What the rank (parent) and the process around the engine (child) say to each other, over a local socket.

A message is a 4-byte little-endian length and a msgpack union. The members of a pipeline talk to its leader in the
same frames.
"""

from __future__ import annotations

import asyncio
import struct
from typing import Final

import msgspec

from engine.protocol import SamplingParams, TokenLogprobs
from planner.protocol import Wire

_LENGTH: Final = struct.Struct("<I")
MAX_MESSAGE_BYTES: Final = 1 << 28


class EngineSpec(Wire, frozen=True, kw_only=True):
    """All that an engine's arguments are made of."""

    model_dir: str
    dtype: str
    tensor: int
    layers: list[int]
    """Of each stage."""
    gpus_per_node: int
    max_batch: int
    max_model_len: int
    max_num_tokens: int
    block_tokens: int
    num_kv_blocks: int
    prefix_caching: bool = True
    gpu_memory_fraction: float = 0.9
    """Of what is free once the weights are in."""
    cuda_graphs: bool = True
    autotuner: bool = True
    store_dirs: list[str] = []
    """Weight store of each world rank, on its own node; empty: the engine reads the model directory by itself."""
    vocab_size: int = 0
    ray: bool = False
    """Ray starts the ranks, in place of MPI."""
    kv_dir: str = ""
    """Where the KV connector keeps blocks; empty: it is off."""
    kv_limit_bytes: int = 0


# --- Parent to child -------------------------------------------------------------------------------------------


class Build(Wire, frozen=True, kw_only=True, tag=True):
    spec: EngineSpec


class Generate(Wire, frozen=True, kw_only=True, tag=True):
    """Go on after `token_ids`: the prompt (the first `num_prompt`), and what is committed."""

    id: int
    token_ids: list[int]
    num_prompt: int
    choice: int
    sampling: SamplingParams
    max_tokens: int
    """That are left."""


class Abort(Wire, frozen=True, kw_only=True, tag=True):
    id: int


class Shutdown(Wire, frozen=True, kw_only=True, tag=True):
    """Shut the engine down and end; the parent does not wait for ever."""


# --- Child to parent -------------------------------------------------------------------------------------------


class Imported(Wire, frozen=True, kw_only=True, tag=True):
    """The first message: TensorRT-LLM is there, and may be used."""

    version: str
    num_gpus: int
    import_s: float


class Built(Wire, frozen=True, kw_only=True, tag=True):
    """The engine takes requests."""

    phases_s: dict[str, float]


class Failed(Wire, frozen=True, kw_only=True, tag=True):
    """The engine cannot be had, or is dead; the last message."""

    cause: str


class Tokens(Wire, frozen=True, kw_only=True, tag=True):
    """News of one request; `ids` are new."""

    id: int
    ids: list[int] = []
    logprobs: list[TokenLogprobs] | None = None
    cached_tokens: int = 0
    ended: bool = False
    """Nothing more comes."""
    finish_reason: str | None = None
    stop_id: int | None = None
    """The token that stopped it, if the engine says so."""
    error: str | None = None


class Batch(Wire, frozen=True, kw_only=True, tag=True):
    """Everything since the last batch; in the order in which it came."""

    tokens: list[Tokens]


class Closed(Wire, frozen=True, kw_only=True, tag=True):
    """`shutdown()` has returned."""


# --- Member to leader, and back --------------------------------------------------------------------------------


class Join(Wire, frozen=True, kw_only=True, tag=True):
    """A member has started its part: its device is free, and its weights are in."""

    pipeline: str
    rank: str


class Ready(Wire, frozen=True, kw_only=True, tag=True):
    phases_s: dict[str, float] = {}


class Over(Wire, frozen=True, kw_only=True, tag=True):
    """The pipeline has ended: as it was told to (no cause), or not."""

    cause: str = ""


Message = Build | Generate | Abort | Shutdown | Imported | Built | Failed | Batch | Closed | Join | Ready | Over
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    """A frame."""
    body = msgspec.msgpack.encode(message)
    return _LENGTH.pack(len(body)) + body


async def receive(reader: asyncio.StreamReader) -> Message | None:
    """The next message; None once the peer is gone. Raises msgspec.MsgspecError or ValueError for anything else."""
    try:
        (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        if length > MAX_MESSAGE_BYTES:
            raise ValueError(f"a message of {length} bytes")
        return _decoder.decode(await reader.readexactly(length))
    except (OSError, asyncio.IncompleteReadError):
        return None
