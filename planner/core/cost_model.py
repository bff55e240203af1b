"""What a (data, pipeline, tensor) configuration costs: memory, latency of a typical request, throughput.

The times come from a measured `StepProfile`. A pipeline of P stages runs m = min(P, sequences) micro-batches, so a
step of all its sequences takes the longer of one micro-batch's way through all stages and of the m turns of the
slowest stage (the bubble is in the difference). Prefill is not divided by the number of micro-batches.
"""

from __future__ import annotations

import math
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Final

import msgspec

from planner.core.stages import split_layers
from planner.protocol import ModelShape, ParallelConfig, StepProfile

ALL_REDUCES_PER_LAYER: Final = 2
"""One after attention, one after the MLP."""
GUESSED_BYTES_PER_S: Final = 5e9
"""Memory bandwidth assumed where no instance has measured its steps."""


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """What the gateways see."""

    arrivals_per_s: float = 0.0
    prompt_tokens: float = 512.0
    output_tokens: float = 128.0


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    config: ParallelConfig
    latency_s: float
    """Of a typical request, queueing included; infinite where arrivals exceed the throughput."""
    service_s: float
    """The same without queueing."""
    throughput_per_s: float
    """Requests a second with full batches."""


class CostModel:
    """Costs of configurations of one model on ranks with at least `memory_bytes` each."""

    def __init__(
        self, model: ModelShape, profile: StepProfile | None, memory_bytes: int, workload: Workload, max_batch: int
    ) -> None:
        self.model = model
        self.profile = profile if profile is not None and _is_usable(profile) else guess_profile(model)
        self.memory_bytes = memory_bytes
        self.workload = workload
        self.max_batch = max_batch

    @cached_property
    def head_cost_layers(self) -> float:
        """Time of embedding, head and sampling in decoder layers, at batch 1."""
        layer_ms = self._layer_ms(1)
        return self._head_ms(1) / layer_ms if layer_ms > 0 else 0.0

    def stages(self, pipeline: int) -> list[tuple[int, int]]:
        """(first, last) decoder layer of each of `pipeline` stages."""
        return split_layers(self.model.num_layers, pipeline, self.head_cost_layers)

    # --- Memory ---

    @property
    def min_kv_blocks(self) -> int:
        """One sequence of the greatest length must fit."""
        return -(-self.model.max_model_len // self.model.kv_block_tokens)

    def weight_bytes(self, pipeline: int, tensor: int) -> int:
        """Weights of the rank that holds most."""
        groups = self.model.num_head_groups // tensor
        return max(
            groups * sum(self.model.unit_bytes(layer) for layer in self.model.layers_of_stage(first, last))
            for first, last in self.stages(pipeline)
        )

    def num_kv_blocks(self, pipeline: int, tensor: int) -> int:
        """KV blocks that a pipeline gets; 0 if the model does not fit in this shape."""
        groups = self.model.num_head_groups // tensor
        fewest_all, fewest_half = math.inf, math.inf
        for first, last in self.stages(pipeline):
            layers = self.model.layers_of_stage(first, last)
            free_bytes = self.memory_bytes - groups * sum(self.model.unit_bytes(layer) for layer in layers)
            block_bytes = (last - first + 1) * groups * self.model.kv_unit_bytes_per_token * self.model.kv_block_tokens
            fewest_all = min(fewest_all, free_bytes // block_bytes)
            # During a migration the pools of the old and the new pipeline exist side by side.
            fewest_half = min(fewest_half, free_bytes // 2 // block_bytes)
        if fewest_all < self.min_kv_blocks:
            return 0
        return int(min(max(fewest_half, self.min_kv_blocks), self.max_batch * self.min_kv_blocks))

    def batch(self, pipeline: int, tensor: int) -> int:
        """Sequences that a pipeline decodes at once, limited by the KV of typical requests."""
        typical_blocks = math.ceil(
            (self.workload.prompt_tokens + self.workload.output_tokens) / self.model.kv_block_tokens
        )
        return max(1, min(self.max_batch, self.num_kv_blocks(pipeline, tensor) // max(1, typical_blocks)))

    # --- Time ---

    def decode_step_ms(self, pipeline: int, tensor: int, num_sequences: int) -> float:
        """Until every one of `num_sequences` of one pipeline has its next token."""
        num_micro_batches = min(pipeline, num_sequences)
        micro_batch = -(-num_sequences // num_micro_batches)
        times_ms = self._stage_ms(pipeline, tensor, micro_batch)
        hop_ms = self.profile.stage_hop_ms if pipeline > 1 else 0.0
        through_all_ms = sum(times_ms) + hop_ms * (pipeline - 1)
        return max(through_all_ms, num_micro_batches * (max(times_ms) + hop_ms))

    def prefill_ms(self, pipeline: int, tensor: int, num_layers: int | None = None) -> float:
        """A typical prompt through all stages, or through `num_layers` layers of them."""
        layers = self.model.num_layers if num_layers is None else num_layers
        per_token_ms = self.profile.prefill_layer_ms_per_token * layers / tensor
        reduce_ms = self._all_reduce_ms(tensor) * ALL_REDUCES_PER_LAYER * layers
        return self.workload.prompt_tokens * per_token_ms + reduce_ms + self.profile.stage_hop_ms * (pipeline - 1)

    def estimate(self, data: int, pipeline: int, tensor: int) -> Estimate | None:
        """None if the model does not fit."""
        if self.num_kv_blocks(pipeline, tensor) == 0:
            return None
        batch = self.batch(pipeline, tensor)
        throughput_per_s = data * self._throughput_per_s(pipeline, tensor, batch)
        service_s = self._service_s(data, pipeline, tensor, batch)
        load = self.workload.arrivals_per_s / throughput_per_s
        # Mean wait of a queue with random arrivals and equal service times.
        wait_s = load / (2 * throughput_per_s * (1 - load)) if load < 1 else math.inf
        return Estimate(
            config=ParallelConfig(data=data, pipeline=pipeline, tensor=tensor, max_batch=batch),
            latency_s=service_s + wait_s,
            service_s=service_s,
            throughput_per_s=throughput_per_s,
        )

    def _service_s(self, data: int, pipeline: int, tensor: int, batch: int) -> float:
        prefill_ms, num_sequences, service_s = self.prefill_ms(pipeline, tensor), 1, 0.0
        for _ in range(4):  # Little's law: the latency decides how many decode at once, which decides the latency
            step_ms = self.decode_step_ms(pipeline, tensor, num_sequences)
            service_s = (prefill_ms + self.workload.output_tokens * step_ms) / 1000
            concurrency = self.workload.arrivals_per_s / data * service_s
            num_sequences = max(1, min(batch, math.ceil(concurrency)))
        return service_s

    def _throughput_per_s(self, pipeline: int, tensor: int, batch: int) -> float:
        most_layers = max(last - first + 1 for first, last in self.stages(pipeline))
        prefill_ms = self.prefill_ms(pipeline, tensor, most_layers)
        decode_ms = self.workload.output_tokens * self.decode_step_ms(pipeline, tensor, batch) / batch
        return 1000 / max(prefill_ms + decode_ms, 1e-6)

    def _stage_ms(self, pipeline: int, tensor: int, batch: int) -> list[float]:
        reduce_ms = self._all_reduce_ms(tensor)
        layer_ms = self._layer_ms(batch) / tensor + ALL_REDUCES_PER_LAYER * reduce_ms
        times_ms = [(last - first + 1) * layer_ms for first, last in self.stages(pipeline)]
        times_ms[-1] += self._head_ms(batch) / tensor + reduce_ms
        return times_ms

    def _all_reduce_ms(self, tensor: int) -> float:
        # Measured on CPU: 1.2 ms among two ranks, 3 ms among three.
        return self.profile.all_reduce_ms * (tensor - 1)

    def _layer_ms(self, batch: int) -> float:
        return interpolate(tuple(self.profile.batch_sizes), tuple(self.profile.decode_layer_ms), batch)

    def _head_ms(self, batch: int) -> float:
        return interpolate(tuple(self.profile.batch_sizes), tuple(self.profile.decode_head_ms), batch)


@lru_cache(maxsize=4096)
def interpolate(xs: tuple[int, ...], ys: tuple[float, ...], x: float) -> float:
    """Piecewise linear through (xs, ys), ascending xs; flat before the first, the last slope after the last."""
    if len(xs) == 1 or x <= xs[0]:
        return ys[0]
    right = next((index for index in range(1, len(xs)) if x <= xs[index]), len(xs) - 1)
    slope = (ys[right] - ys[right - 1]) / (xs[right] - xs[right - 1])
    return max(0.0, ys[right - 1] + slope * (x - xs[right - 1]))


def guess_profile(model: ModelShape) -> StepProfile:
    """Step times from the bytes that a step reads, where nobody has measured any."""
    layer_ms = model.num_head_groups * model.decoder_unit_bytes / GUESSED_BYTES_PER_S * 1000
    head_ms = model.num_head_groups * model.head_unit_bytes / GUESSED_BYTES_PER_S * 1000
    if model.tied_embeddings:
        head_ms += model.num_head_groups * model.embedding_unit_bytes / GUESSED_BYTES_PER_S * 1000
    return StepProfile(
        batch_sizes=[1, 8],
        decode_layer_ms=[layer_ms, 2 * layer_ms],
        decode_head_ms=[head_ms, 2 * head_ms],
        prefill_layer_ms_per_token=layer_ms / 8,
        stage_hop_ms=0.3,
        all_reduce_ms=1.2,
        transfer_bytes_per_s=5e8,
    )


def _is_usable(profile: StepProfile) -> bool:
    sizes = profile.batch_sizes
    return (
        len(sizes) == len(profile.decode_layer_ms) == len(profile.decode_head_ms) > 0
        and all(left < right for left, right in pairwise(sizes))
        and min(*profile.decode_layer_ms, profile.transfer_bytes_per_s) > 0
    )
