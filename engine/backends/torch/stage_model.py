"""The part of the model that one rank computes: decoder layers first..last over head groups first..last."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import Tensor

from engine.backends.torch.attention import BatchRows, FastAttention, SequenceSlice, StageBatch
from engine.backends.torch.fixed import TILE_ROWS, FixedAttention, FixedLayer, add_in_group_order, fixed_logits
from engine.backends.torch.kv_pool import KvPool
from engine.backends.torch.layers import DecoderBlock, RotaryTable, VocabularyBlock, rms_norm
from engine.backends.torch.tensor_group import SoloGroup, TensorGroup
from engine.backends.torch.units import UnitTensors
from engine.backends.torch.weights import WeightStore
from engine.core.model_config import ModelConfig
from engine.errors import MissingUnit
from planner.protocol import EMBEDDING_LAYER

__all__ = ["SequenceSlice", "SoloGroup", "StageBatch", "StageModel", "TensorGroup"]

Reduction = Literal["fast", "fixed"]


class StageModel:
    """Computes with the blocks of a store; may be built while another stage model over the store still serves.

    "fast" adds the shards' parts by all-reduce. "fixed" makes a row's result bit-identical for every shape of the
    pipeline and every batch, on one kind of CPU (see fixed.py).
    """

    def __init__(
        self,
        config: ModelConfig,
        first_layer: int,
        last_layer: int,
        first_group: int,
        last_group: int,
        store: WeightStore,
        group: TensorGroup,
        reduction: Reduction,
        max_model_len: int,
    ) -> None:
        """Raises MissingUnit naming the units that the store lacks, and as `ModelConfig.model_len` does."""
        self.config = config
        self.is_first = first_layer == 0
        self.is_last = last_layer == config.num_layers - 1
        self._layers = range(first_layer, last_layer + 1)
        self._group = group
        self._dtype, self._device = store.dtype, store.device
        groups = range(first_group, last_group + 1)
        _require(store, self._all_layers(), groups)
        self._rope = RotaryTable(config, config.model_len(max_model_len), store.dtype, store.device)
        fuse = partial(DecoderBlock, config)
        self._blocks: list[DecoderBlock] = []
        self._fixed_layers: list[FixedLayer] = []
        for layer in self._layers:
            if reduction == "fast":
                self._blocks.append(store.block(DecoderBlock, layer, groups, fuse))
            else:
                singles = [store.block(DecoderBlock, layer, range(g, g + 1), fuse) for g in groups]
                self._fixed_layers.append(FixedLayer(singles))
        self._head: list[VocabularyBlock] = []
        if self.is_last:
            tied = config.tie_word_embeddings
            head_layer = EMBEDDING_LAYER if tied else config.num_layers
            self._head = [self._vocabulary(store, head_layer, g, as_head=True) for g in groups]
            self._norm_H = store.tensors(config.num_layers, groups[:1])[0]["norm"].clone()
        self._embedding: list[VocabularyBlock] = []
        if self.is_first:
            self._embedding = [self._vocabulary(store, EMBEDDING_LAYER, g, as_head=False) for g in groups]

    @torch.inference_mode()
    def forward(self, batch: StageBatch, hidden: Tensor | None, kv: KvPool) -> Tensor:
        """One step of this stage; every shard of it calls this with the same batch.

        Args:
            batch: the rows; their KV is appended to the pool.
            hidden: [rows, hidden_size] of the stage before, left as it is; None on the first stage.
            kv: pool of this stage's layers and head groups.

        Returns:
            [rows, hidden_size] for the next stage; on the last stage the logits [sequences that want them, vocabulary
            rows of this shard's head groups], float32.

        """
        rows = BatchRows(batch, kv.block_tokens, self._device)
        x_RH = self._embed(batch.token_ids) if hidden is None else hidden
        decode = self._decode_fixed if self._fixed_layers else self._decode_fast
        x_RH = decode(x_RH, batch, rows, kv)
        return self._logits(x_RH if rows.wants_all else x_RH[rows.wanted]) if self.is_last else x_RH

    def _decode_fast(self, x_RH: Tensor, batch: StageBatch, rows: BatchRows, kv: KvPool) -> Tensor:
        attention = FastAttention(batch, rows, kv.block_tokens, self.config.heads_per_group, x_RH)
        rotation = self._rope.rotation(rows.positions_R)
        for layer, block in zip(self._layers, self._blocks, strict=True):
            part_RH = block.o(attention(block.project_qkv(x_RH, rotation), layer, kv))
            self._group.all_reduce(part_RH)
            x_RH = part_RH.add_(x_RH)
            part_RH = block.mlp(x_RH)
            self._group.all_reduce(part_RH)
            x_RH = part_RH.add_(x_RH)
        return x_RH

    def _decode_fixed(self, x_RH: Tensor, batch: StageBatch, rows: BatchRows, kv: KvPool) -> Tensor:
        attention = FixedAttention(batch, rows, kv.block_tokens, self._device)
        padding = rows.positions_R.new_zeros(-rows.num_rows % TILE_ROWS)
        rotation = self._rope.rotation(torch.cat([rows.positions_R, padding]))
        for layer, fixed in zip(self._layers, self._fixed_layers, strict=True):
            parts_GRH = fixed.attend(x_RH, rotation, attention, layer, kv)
            x_RH = x_RH + add_in_group_order(parts_GRH, self._group)
            x_RH = x_RH + add_in_group_order(fixed.mlp(x_RH), self._group)
        return x_RH

    def _embed(self, token_ids: list[int]) -> Tensor:
        x_RH = torch.zeros(len(token_ids), self.config.hidden_size, dtype=self._dtype, device=self._device)
        for table in self._embedding:
            table.embed_into(x_RH, token_ids)
        # Exactly one shard holds a token's row, so that the sum is exact in either reduction.
        self._group.all_reduce(x_RH)
        return x_RH

    def _logits(self, x_RH: Tensor) -> Tensor:
        num_local = sum(table.num_rows for table in self._head)
        if len(x_RH) == 0:
            return torch.empty(0, num_local, dtype=torch.float32, device=self._device)
        eps = self.config.rms_norm_eps
        if self._fixed_layers:
            return fixed_logits(x_RH, self._norm_H, eps, self._head).float()
        normed_RH = rms_norm(x_RH, self._norm_H, eps)
        return torch.cat([table.logits(normed_RH) for table in self._head], 1).float()

    def _all_layers(self) -> list[int]:
        """Layers of which this stage needs units; see ModelShape.layers_of_stage."""
        shape = self.config.shape("", self._dtype.itemsize, 1, 1)
        return shape.layers_of_stage(self._layers[0], self._layers[-1])

    def _vocabulary(self, store: WeightStore, layer: int, group: int, *, as_head: bool) -> VocabularyBlock:
        name = "embedding" if layer == EMBEDDING_LAYER else "lm_head"

        def fuse(groups: range, units: list[UnitTensors]) -> VocabularyBlock:
            return VocabularyBlock(name, groups, units[0], self.config, as_head=as_head)

        block = store.block(VocabularyBlock, layer, range(group, group + 1), fuse)
        if as_head and not block.as_head:
            store.put(layer, group, block.units()[0])
            block = store.block(VocabularyBlock, layer, range(group, group + 1), fuse)
        return block


def _require(store: WeightStore, layers: list[int], groups: range) -> None:
    held = store.units()
    missing = [(layer, group) for layer in layers for group in groups if (layer, group) not in held]
    if missing:
        raise MissingUnit(missing)
