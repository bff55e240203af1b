"""A model directory in the Hugging Face layout, read unit by unit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.backends.torch.units import UnitTensors
from engine.core.model_config import ModelConfig
from engine.errors import InvalidModelConfig, MissingTensor
from planner.protocol import EMBEDDING_LAYER

READABLE_DTYPES: Final = ("F32", "F16", "BF16")
SINGLE_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"
EMBEDDING: Final = "model.embed_tokens.weight"
MAX_HEADER_BYTES: Final = 100_000_000


class _TensorHeader(msgspec.Struct):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


class Checkpoint:
    """config.json and safetensors files; only headers are read until a unit is asked for."""

    def __init__(self, directory: Path) -> None:
        """Raises UnsupportedModel, InvalidModelConfig, or MissingTensor naming the tensor and the file."""
        self._directory = directory
        self.config = ModelConfig.from_dict(_read_json(directory / "config.json"))
        self._file_of: dict[str, Path] = {}
        headers: dict[str, _TensorHeader] = {}
        for path in self._files():
            header = _read_header(path)
            headers |= header
            self._file_of |= dict.fromkeys(header, path)
        self._check(headers)

    def load_unit(self, layer: int, group: int, dtype: torch.dtype) -> UnitTensors:
        """Tensors of one unit in `dtype` on the CPU; reads the slices of that unit and nothing else."""
        with self._slices() as read:
            if layer == EMBEDDING_LAYER:
                tensors = {"embedding": self._vocabulary(read, EMBEDDING, group)}
            elif layer == self.config.num_layers:
                tensors = {"norm": read("model.norm.weight")}
                if not self.config.tie_word_embeddings:
                    tensors["lm_head"] = self._vocabulary(read, "lm_head.weight", group)
            else:
                tensors = self._decoder(read, f"model.layers.{layer}.", group)
            return {name: tensors[name].to(dtype, copy=True).contiguous() for name in self.config.unit_shapes(layer)}

    def _decoder(self, read: _Reader, prefix: str, group: int) -> UnitTensors:
        config, dim, heads = self.config, self.config.head_dim, self.config.heads_per_group
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        first, last = config.columns_of_group(config.intermediate_size, group)
        columns = config.padded_columns(config.intermediate_size)
        heads_of = {"q": heads * dim, "k": dim, "v": dim}

        def qkv(kind: str) -> Tensor:
            return torch.cat(
                [read(f"{attention}{p}_proj.{kind}", (group * n, (group + 1) * n)) for p, n in heads_of.items()]
            )

        gate, up = (read(f"{mlp}{name}_proj.weight", (first, last)) for name in ("gate", "up"))
        tensors = {
            "input_norm": read(f"{prefix}input_layernorm.weight"),
            "post_norm": read(f"{prefix}post_attention_layernorm.weight"),
            "qkv": qkv("weight"),
            "o": read(f"{attention}o_proj.weight", columns=(group * heads * dim, (group + 1) * heads * dim)),
            "gate_up": torch.cat([_padded(gate, columns, 0), _padded(up, columns, 0)]),
            "down": _padded(read(f"{mlp}down_proj.weight", columns=(first, last)), columns, 1),
        }
        if config.qkv_bias:
            tensors["qkv_bias"] = qkv("bias")
        if config.qk_norm:
            tensors |= {name: read(f"{attention}{name}.weight") for name in ("q_norm", "k_norm")}
        return tensors

    def _vocabulary(self, read: _Reader, name: str, group: int) -> Tensor:
        rows = self.config.columns_of_group(self.config.vocab_size, group)
        return _padded(read(name, rows), self.config.padded_columns(self.config.vocab_size), 0)

    @contextmanager
    def _slices(self) -> Iterator[_Reader]:
        """A reader whose files are mapped for as long as the block lasts, so that no pages stay behind."""
        reader = _Reader(self._file_of)
        try:
            yield reader
        finally:
            reader.close()

    def _files(self) -> list[Path]:
        index = self._directory / INDEX_FILE
        if not index.exists():
            return [self._directory / SINGLE_FILE]
        names = _read_json(index).get("weight_map", {}).values()
        return [self._directory / name for name in sorted(set(names))]

    def _check(self, headers: dict[str, _TensorHeader]) -> None:
        for name, shape in _expected_tensors(self.config).items():
            header = headers.get(name)
            if header is None:
                raise MissingTensor(name, str(self._directory))
            if header.dtype not in READABLE_DTYPES:
                raise MissingTensor(name, str(self._file_of[name]), f"has unsupported dtype {header.dtype}")
            if header.shape != shape:
                problem = f"has shape {header.shape}, config.json says {shape}"
                raise MissingTensor(name, str(self._file_of[name]), problem)


class _Reader:
    """Reads rows or columns of named tensors."""

    def __init__(self, file_of: dict[str, Path]) -> None:
        self._file_of = file_of
        self._open: dict[Path, Any] = {}

    def __call__(
        self, name: str, rows: tuple[int, int] | None = None, columns: tuple[int, int] | None = None
    ) -> Tensor:
        path = self._file_of[name]
        try:
            if path not in self._open:
                self._open[path] = _open(path)
            piece = self._open[path].get_slice(name)
        except (OSError, SafetensorError) as error:
            raise MissingTensor(name, str(path), f"cannot be read: {error}") from error
        if columns is not None:
            tensor: Tensor = piece[:, columns[0] : columns[1]]
        elif rows is not None:
            tensor = piece[rows[0] : rows[1]]
        else:
            tensor = piece[:]
        return tensor

    def close(self) -> None:
        for file in self._open.values():
            file.__exit__(None, None, None)


def _open(path: Path) -> Any:
    file: Any = safe_open(path, framework="pt")
    return file.__enter__()


def _padded(tensor: Tensor, size: int, dim: int) -> Tensor:
    """`tensor` with zeros behind it in dimension `dim` up to `size`."""
    missing = size - tensor.shape[dim]
    if missing == 0:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)


def _expected_tensors(config: ModelConfig) -> dict[str, list[int]]:
    hidden, columns, dim = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_heads * dim, config.num_kv_heads * dim
    layer = {
        "input_layernorm.weight": [hidden],
        "post_attention_layernorm.weight": [hidden],
        "self_attn.q_proj.weight": [queries, hidden],
        "self_attn.k_proj.weight": [keys, hidden],
        "self_attn.v_proj.weight": [keys, hidden],
        "self_attn.o_proj.weight": [hidden, queries],
        "mlp.gate_proj.weight": [columns, hidden],
        "mlp.up_proj.weight": [columns, hidden],
        "mlp.down_proj.weight": [hidden, columns],
    }
    if config.qkv_bias:
        layer |= {f"self_attn.{p}_proj.bias": [n] for p, n in (("q", queries), ("k", keys), ("v", keys))}
    if config.qk_norm:
        layer |= {"self_attn.q_norm.weight": [dim], "self_attn.k_norm.weight": [dim]}
    expected = {
        f"model.layers.{number}.{name}": shape for number in range(config.num_layers) for name, shape in layer.items()
    }
    expected |= {EMBEDDING: [config.vocab_size, hidden], "model.norm.weight": [hidden]}
    if not config.tie_word_embeddings:
        expected["lm_head.weight"] = [config.vocab_size, hidden]
    return expected


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except OSError as error:
        raise InvalidModelConfig(path.name, f"cannot be read: {error}") from error
    except msgspec.DecodeError as error:
        raise InvalidModelConfig(path.name, f"in {path.parent} is not a JSON object: {error}") from error


def _read_header(path: Path) -> dict[str, _TensorHeader]:
    """Header of a safetensors file: 8 bytes of length (little-endian), then JSON. A short file is refused."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MAX_HEADER_BYTES:
                raise MissingTensor("header", str(path), f"is no safetensors header ({length} bytes)")
            header = msgspec.json.decode(file.read(length), type=dict[str, msgspec.Raw])
        header.pop("__metadata__", None)
        tensors = {name: msgspec.json.decode(raw, type=_TensorHeader) for name, raw in header.items()}
    except OSError as error:
        raise MissingTensor("weights", str(path), f"cannot be read: {error}") from error
    except msgspec.MsgspecError as error:
        raise MissingTensor("header", str(path), f"is no safetensors header: {error}") from error
    num_bytes = path.stat().st_size - 8 - length
    for name, tensor in tensors.items():
        if tensor.data_offsets[1] > num_bytes:
            raise MissingTensor(name, str(path), "lies behind the end of the file, which is truncated")
    return tensors
