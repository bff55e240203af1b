"""Model weights of an instance in shared host memory: units come in and go out, engines read whole tensors.

A file for each tensor of the checkpoint, in its own layout, so that an engine maps it as it is and copies nothing;
a unit (layer, head group) is a set of slices of a layer's tensors. The ranks of the instance, and the engines that
they start one after the other, share one directory. A unit counts as held once its note stands beside the tensors.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

import torch
from torch import Tensor

from engine.backends.tensorrt_llm.processes import is_alive
from engine.backends.torch.units import UnitTensors, unit_from_bytes, unit_to_bytes
from engine.core.model_config import ModelConfig
from engine.core.roles import Unit
from engine.errors import EngineUnavailable, MissingUnit
from planner.protocol import EMBEDDING_LAYER

_PREFIX: Final = "spotserve-weights-"
_CPU: Final = torch.device("cpu")


class Place(NamedTuple):
    """Where a piece of a unit's tensor lies: rows of it, and the rows and columns of the checkpoint's tensor."""

    part: str
    part_rows: tuple[int, int]
    part_columns: int | None
    """Without padding; None: it has no columns, or all of them count."""
    tensor: str
    rows: tuple[int, int] | None
    columns: tuple[int, int] | None


def tensor_shapes(config: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
    """Tensors of the checkpoint that the units of `layer` are cut from."""
    hidden, dim, columns = config.hidden_size, config.head_dim, config.intermediate_size
    if layer == EMBEDDING_LAYER:
        return {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    if layer == config.num_layers:
        head = {} if config.tie_word_embeddings else {"lm_head.weight": (config.vocab_size, hidden)}
        return {"model.norm.weight": (hidden,), **head}
    heads = {"q": config.num_heads * dim, "k": config.num_kv_heads * dim, "v": config.num_kv_heads * dim}
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.o_proj.weight": (hidden, heads["q"]),
        "mlp.gate_proj.weight": (columns, hidden),
        "mlp.up_proj.weight": (columns, hidden),
        "mlp.down_proj.weight": (hidden, columns),
    }
    shapes |= {f"self_attn.{name}_proj.weight": (rows, hidden) for name, rows in heads.items()}
    if config.qkv_bias:
        shapes |= {f"self_attn.{name}_proj.bias": (rows,) for name, rows in heads.items()}
    if config.qk_norm:
        shapes |= {f"self_attn.{name}_norm.weight": (dim,) for name in ("q", "k")}
    return {f"model.layers.{layer}.{name}": shape for name, shape in shapes.items()}


def places(config: ModelConfig, layer: int, group: int) -> list[Place]:
    """How the unit's tensors (`ModelConfig.unit_shapes`) lie in those of the checkpoint."""
    shapes = config.unit_shapes(layer)
    if layer in (EMBEDDING_LAYER, config.num_layers):
        names = {"embedding": "model.embed_tokens.weight", "lm_head": "lm_head.weight", "norm": "model.norm.weight"}
        first, last = config.columns_of_group(config.vocab_size, group)
        return [
            _whole(part, shapes, names[part])
            if part == "norm"
            else Place(part, (0, last - first), None, names[part], (first, last), None)
            for part in shapes
        ]
    prefix, dim, heads = f"model.layers.{layer}.", config.head_dim, config.heads_per_group
    found = [
        _whole("input_norm", shapes, f"{prefix}input_layernorm.weight"),
        _whole("post_norm", shapes, f"{prefix}post_attention_layernorm.weight"),
    ]
    if config.qk_norm:
        found += [_whole(f"{name}_norm", shapes, f"{prefix}self_attn.{name}_norm.weight") for name in ("q", "k")]
    kinds = {"qkv": "weight", "qkv_bias": "bias"} if config.qkv_bias else {"qkv": "weight"}
    for part, kind in kinds.items():
        start = 0
        for name, rows in (("q", heads * dim), ("k", dim), ("v", dim)):
            tensor = f"{prefix}self_attn.{name}_proj.{kind}"
            found.append(Place(part, (start, start + rows), None, tensor, (group * rows, (group + 1) * rows), None))
            start += rows
    first, last = config.columns_of_group(config.intermediate_size, group)
    padded, count, all_rows = config.padded_columns(config.intermediate_size), last - first, (0, config.hidden_size)
    query = (group * heads * dim, (group + 1) * heads * dim)
    return [
        *found,
        Place("gate_up", (0, count), None, f"{prefix}mlp.gate_proj.weight", (first, last), None),
        Place("gate_up", (padded, padded + count), None, f"{prefix}mlp.up_proj.weight", (first, last), None),
        Place("o", all_rows, None, f"{prefix}self_attn.o_proj.weight", None, query),
        Place("down", all_rows, count, f"{prefix}mlp.down_proj.weight", None, (first, last)),
    ]


def _whole(part: str, shapes: Mapping[str, tuple[int, ...]], tensor: str) -> Place:
    return Place(part, (0, shapes[part][0]), None, tensor, None, None)


def checkpoint_checksum(model_dir: Path) -> str:
    """The same for copies of a checkpoint on several nodes; another for another one, or one of other sizes."""
    digest = hashlib.sha256((model_dir / "config.json").read_bytes())
    for path in sorted(model_dir.glob("*.safetensors")):
        digest.update(f"{path.name} {path.stat().st_size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(1 << 16))  # Names, shapes and places of its tensors, and the first of them.
    return digest.hexdigest()


def store_dir(root: Path, checksum: str, dtype: str, owner: str) -> Path:
    """The directory of one instance's weights."""
    return root / f"{_PREFIX}{hashlib.sha256(f'{checksum} {dtype} {owner}'.encode()).hexdigest()[:16]}"


class SharedWeights:
    """The directory, as the ranks and the engines of an instance see it. Methods may be called from any thread."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, directory: Path) -> None:
        self.config = config
        self.dtype = dtype
        self.directory = directory
        self._mapped: dict[str, Tensor] = {}

    def create(self, owner_pid: int) -> None:
        """Make the directory, and remove those whose owner is gone.

        Raises:
            EngineUnavailable: there cannot be one.

        """
        try:
            for other in self.directory.parent.glob(f"{_PREFIX}*"):
                owner = other / "owner"
                if other != self.directory and owner.exists() and not is_alive(int(owner.read_text() or 0)):
                    shutil.rmtree(other, ignore_errors=True)
            self.directory.mkdir(parents=True, exist_ok=True)
            self._write_note("owner", str(owner_pid))
        except (OSError, ValueError) as error:
            raise EngineUnavailable(
                f"SPOTSERVE_ENGINE_STORE_DIR: weights cannot be kept in {self.directory}: {error}"
            ) from error

    def remove(self) -> None:
        self._mapped.clear()
        shutil.rmtree(self.directory, ignore_errors=True)

    def units(self) -> set[Unit]:
        try:
            names = [path.name for path in self.directory.iterdir()]
        except OSError:
            return set()
        parts = [name.split("_") for name in names if name.startswith("unit_")]
        return {(int(layer), int(group)) for _, layer, group in parts}

    def check_room(self, num_bytes: int) -> None:
        """Raises EngineUnavailable if so much more does not fit."""
        free_bytes = shutil.disk_usage(self.directory).free
        if num_bytes > free_bytes:
            raise EngineUnavailable(
                f"weights of {num_bytes / 2**30:.1f} GiB do not fit into {self.directory.parent}, which has "
                f"{free_bytes / 2**30:.1f} GiB left: give the container more shared memory (docker run --shm-size), "
                "or set SPOTSERVE_ENGINE_STORE_DIR to a directory with room"
            )

    def put(self, layer: int, group: int, tensors: UnitTensors) -> None:
        """Hold a unit."""
        for place in places(self.config, layer, group):
            piece = tensors[place.part][slice(*place.part_rows)]
            piece = piece[:, : place.part_columns] if place.part_columns is not None else piece
            self._slice(layer, place).copy_(piece)
        self._write_note(f"unit_{layer}_{group}", "")

    def import_unit(self, layer: int, group: int, data: bytes | memoryview) -> None:
        """Raises CorruptUnit if the size is wrong."""
        self.put(layer, group, unit_from_bytes(self.config, layer, group, data, self.dtype, _CPU))

    def export_unit(self, layer: int, group: int) -> bytes:
        """The unit as bytes that depend only on config and dtype. Raises MissingUnit."""
        if (layer, group) not in self.units():
            raise MissingUnit([(layer, group)])
        parts = {name: torch.zeros(shape, dtype=self.dtype) for name, shape in self.config.unit_shapes(layer).items()}
        for place in places(self.config, layer, group):
            target = parts[place.part][slice(*place.part_rows)]
            target = target[:, : place.part_columns] if place.part_columns is not None else target
            target.copy_(self._slice(layer, place))
        return unit_to_bytes(self.config, layer, parts)

    def tensor(self, layer: int, name: str) -> Tensor:
        """A tensor of the checkpoint, mapped; where units are missing it is zero."""
        if name not in self._mapped:
            shape = tensor_shapes(self.config, layer)[name]
            self.directory.mkdir(exist_ok=True)
            path, num_elements = self.directory / f"{name}.bin", math.prod(shape)
            _grow(path, num_elements * self.dtype.itemsize)
            flat = torch.from_file(str(path), shared=True, size=num_elements, dtype=self.dtype)
            self._mapped[name] = flat.view(shape)
        return self._mapped[name]

    def _slice(self, layer: int, place: Place) -> Tensor:
        tensor = self.tensor(layer, place.tensor)
        if place.columns is not None:
            return tensor[:, slice(*place.columns)]
        return tensor[slice(*place.rows)] if place.rows is not None else tensor

    def _write_note(self, name: str, text: str) -> None:
        partial = self.directory / f".{name}.{os.getpid()}"
        partial.write_text(text)
        partial.replace(self.directory / name)


def _grow(path: Path, num_bytes: int) -> None:
    """Give a file its size; what another rank has written into it meanwhile stays.

    `torch.from_file` would write a zero over the first byte of a file that it finds too short.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        os.ftruncate(handle, num_bytes)
    finally:
        os.close(handle)
