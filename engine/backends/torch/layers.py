"""Layers of the decoder over the head groups of one rank.

Shape suffixes: R rows (tokens of the batch), H hidden size, G local head groups, Q query heads a group, D head
dimension, I MLP columns a group (padded), V vocabulary rows a group.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from engine.backends.torch.units import UnitTensors
from engine.core.model_config import ModelConfig

PACKED_DTYPES: Final = (torch.float32, torch.bfloat16)
TYPICAL_ROWS: Final = 8
"""What oneDNN is told to pack for; measured, the layout is as good for 1 to 64 rows."""
CHUNK_ROWS: Final = 1024
"""Vocabulary rows that are packed together: few enough to unpack for one embedding row, enough to compute well."""


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether oneDNN has packed matrices of `dtype` here."""
    if device.type != "cpu" or dtype not in PACKED_DTYPES:
        return False
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]  # torch has no types for it
        return False
    return dtype != torch.bfloat16 or bool(_onednn("_is_mkldnn_bf16_supported")())


def _onednn(operation: str) -> Any:
    """One of PyTorch's operations on packed matrices, which have no public name; torch.compile uses the same ones."""
    return getattr(torch.ops.mkldnn, operation)


class Linear:
    """x [R, K] -> x W^T + bias [R, N], with W [N, K] packed by oneDNN where it can be: up to twice as fast on CPU."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._bias = bias
        self._packed = can_pack(weight.dtype, weight.device)
        self._multiply: Any = _onednn("_linear_pointwise") if self._packed else None
        self._weight = (
            _onednn("_reorder_linear_weight")(weight.contiguous(), TYPICAL_ROWS)
            if self._packed
            else weight.contiguous()
        )

    def __call__(self, x: Tensor) -> Tensor:
        if not self._packed:
            return functional.linear(x, self._weight, self._bias)
        y: Tensor = self._multiply(x, self._weight, self._bias, "none", [], "")
        return y

    def weight(self) -> Tensor:
        """W, unpacked: a copy if it is packed."""
        return self._weight.to_dense() if self._packed else self._weight


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Over the last dimension, in float32; `weight` broadcasts."""
    x32 = x.float()
    scale = torch.rsqrt(x32.pow(2).mean(-1, keepdim=True).add_(eps))
    return (x32 * scale).to(x.dtype).mul_(weight)


class DecoderBlock:
    """One decoder layer's units of consecutive head groups, fused: one matrix where the units have one each."""

    def __init__(self, config: ModelConfig, groups: range, units: list[UnitTensors]) -> None:
        self.groups = groups
        self.config = config
        first = units[0]
        self.input_norm_H = first["input_norm"].clone()
        self.post_norm_H = first["post_norm"].clone()
        self.qk_norm_QD: Tensor | None = None
        """[Q + 1, D]: of each query head and of the key head."""
        if config.qk_norm:
            queries = first["q_norm"].expand(config.heads_per_group, -1)
            self.qk_norm_QD = torch.cat([queries, first["k_norm"][None]])
        self._qkv_bias = torch.cat([unit["qkv_bias"] for unit in units]) if config.qkv_bias else None
        self.qkv = Linear(torch.cat([unit["qkv"] for unit in units]), self._qkv_bias)
        self.o = Linear(torch.cat([unit["o"] for unit in units], dim=1))
        self.gate_up = Linear(torch.cat([unit["gate_up"] for unit in units]))
        self.down = Linear(torch.cat([unit["down"] for unit in units], dim=1))

    def units(self) -> list[UnitTensors]:
        """See Block."""
        count = len(self.groups)
        parts = {
            "qkv": self.qkv.weight().chunk(count),
            "o": self.o.weight().chunk(count, dim=1),
            "gate_up": self.gate_up.weight().chunk(count),
            "down": self.down.weight().chunk(count, dim=1),
        }
        if self._qkv_bias is not None:
            parts["qkv_bias"] = self._qkv_bias.chunk(count)
        norms = {"input_norm": self.input_norm_H, "post_norm": self.post_norm_H}
        if self.qk_norm_QD is not None:
            norms |= {"q_norm": self.qk_norm_QD[0], "k_norm": self.qk_norm_QD[-1]}
        return [norms | {name: part[index] for name, part in parts.items()} for index in range(count)]

    def project_qkv(self, x_RH: Tensor, rotation: Rotation) -> Tensor:
        """[R, G, Q + 2, D]: query heads and key head rotated, then the value head."""
        config = self.config
        num_heads = config.heads_per_group + 2
        normed_RH = rms_norm(x_RH, self.input_norm_H, config.rms_norm_eps)
        qkv = self.qkv(normed_RH).view(len(x_RH), len(self.groups), num_heads, config.head_dim)
        qk = qkv[:, :, :-1]
        if self.qk_norm_QD is not None:
            qk.copy_(rms_norm(qk, self.qk_norm_QD, config.rms_norm_eps))
        rotation.apply_(qk)
        return qkv

    def mlp(self, x_RH: Tensor) -> Tensor:
        """The part [R, H] that these groups add to the MLP's output."""
        normed_RH = rms_norm(x_RH, self.post_norm_H, self.config.rms_norm_eps)
        gate_up = self.gate_up(normed_RH).view(len(x_RH), len(self.groups), 2, -1)
        gated_RGI = functional.silu(gate_up[:, :, 0]).mul_(gate_up[:, :, 1])
        return self.down(gated_RGI.flatten(1))


class Rotation:
    """Rotary embedding of the rows of one batch."""

    def __init__(self, cos_RD: Tensor, signed_sin_RD: Tensor) -> None:
        self._cos = cos_RD[:, None, None]
        self._signed_sin = signed_sin_RD[:, None, None]

    def apply_(self, x_RGND: Tensor) -> None:
        """Rotate the two halves of D against each other, in place.

        Multiplications and an addition of their own: what a fused multiply-add gives can depend on where in a vector
        an element lies, and a row's result must not.
        """
        turned = torch.roll(x_RGND, x_RGND.shape[-1] // 2, dims=-1).mul_(self._signed_sin)
        x_RGND.mul_(self._cos).add_(turned)

    def rows(self, start: int, end: int) -> Rotation:
        return Rotation(self._cos[start:end, 0, 0], self._signed_sin[start:end, 0, 0])


class RotaryTable:
    """Cosine and sine of every position, [max_model_len, D] each."""

    def __init__(self, config: ModelConfig, max_model_len: int, dtype: torch.dtype, device: torch.device) -> None:
        frequencies = torch.tensor(config.rope.inverse_frequencies(config.head_dim), dtype=torch.float32)
        angles = torch.arange(max_model_len, dtype=torch.float32)[:, None] * frequencies
        cos, sin = angles.cos(), angles.sin()
        scale = config.rope.attention_factor
        self._cos = (torch.cat([cos, cos], 1) * scale).to(device, dtype)
        self._signed_sin = (torch.cat([-sin, sin], 1) * scale).to(device, dtype)

    def rotation(self, positions_R: Tensor) -> Rotation:
        return Rotation(self._cos[positions_R], self._signed_sin[positions_R])


class VocabularyBlock:
    """Vocabulary rows of one head group, [V, H]: an embedding, an output head, or (tied) both in one copy.

    As a head it is packed in chunks, and an embedding row is then taken out of its unpacked chunk.
    """

    def __init__(self, name: str, groups: range, unit: UnitTensors, config: ModelConfig, *, as_head: bool) -> None:
        self.groups = groups
        self._name = name
        self._extra = {other: tensor for other, tensor in unit.items() if other != name}
        table_VH = unit[name]
        self.as_head = as_head
        self._chunks = [Linear(chunk) for chunk in torch.split(table_VH, CHUNK_ROWS)] if as_head else []
        self._table_VH = None if as_head else table_VH
        self.first_id, self._end_id = config.columns_of_group(config.vocab_size, groups[0])
        self.num_rows = self._end_id - self.first_id

    def units(self) -> list[UnitTensors]:
        """See Block."""
        table = self._table_VH
        if table is None:
            table = torch.cat([chunk.weight() for chunk in self._chunks])
        return [{**self._extra, self._name: table}]

    def embed_into(self, out_RH: Tensor, token_ids: list[int]) -> None:
        """Write the rows of those tokens that are this group's; leave the others."""
        rows_of: dict[int, list[tuple[int, int]]] = {}
        for row, token in enumerate(token_ids):
            if self.first_id <= token < self._end_id:
                local = token - self.first_id
                chunk = local // CHUNK_ROWS if self.as_head else 0
                rows_of.setdefault(chunk, []).append((row, local - chunk * CHUNK_ROWS))
        for chunk, pairs in rows_of.items():
            table = self._chunks[chunk].weight() if self._table_VH is None else self._table_VH
            rows, locals_ = torch.tensor(pairs, device=out_RH.device).unbind(1)
            out_RH[rows] = table[locals_]

    def logits(self, x_RH: Tensor) -> Tensor:
        """[R, num_rows], without the padding."""
        return torch.cat([chunk(x_RH) for chunk in self._chunks], 1)[:, : self.num_rows]
