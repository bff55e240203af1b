"""The paper's decisions as its artifact computes them, faults included: latency formula, solver, arranger.

For reproduction and comparison only; the planner uses `cost_model` and `config_optimizer`. `corrected=True` drops the
division of the prefill by the number of its micro-batches, which makes prefill look cheaper the more of them there
are although the profile already is of one micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

import msgspec

from planner.core.profile import DegreeTimes, Profile
from planner.errors import ProfileError

OUTPUT_TOKENS: Final = 128
"""Of every request in the paper's experiments."""


class PaperConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One solution of the solver: (D, P, M, B) and the micro-batch counts of prefill (M1) and decode (M2)."""

    data: int
    pipeline: int
    tensor: int
    batch: int
    prefill_micro_batches: int
    decode_micro_batches: int
    latency_s: float
    throughput_per_s: float

    @property
    def num_ranks(self) -> int:
        return self.data * self.pipeline * self.tensor


def prefill_ms(
    profile: Profile, pipeline: int, tensor: int, batch: int, micro_batches: int, *, corrected: bool = False
) -> float:
    """t1: the prefill of a whole batch, without the fix factor."""
    layers = math.ceil(profile.num_layers / pipeline)
    layer_ms = _at(profile, tensor, batch // micro_batches, "prefill_layer_ms")
    turns_ms = layer_ms * layers * (pipeline + micro_batches - 1)
    if not corrected:
        turns_ms /= micro_batches
    return turns_ms + profile.prefill_hop_ms / micro_batches * (pipeline - 1)


def decode_step_ms(profile: Profile, pipeline: int, tensor: int, batch: int, micro_batches: int) -> float:
    """t2: one token for each sequence of the batch, without the fix factor."""
    layers = math.ceil(profile.num_layers / pipeline)
    layer_ms = _at(profile, tensor, batch // micro_batches, "decode_layer_ms")
    turns_ms = layer_ms * layers * (pipeline + micro_batches - 1)
    return turns_ms + profile.decode_hop_ms / micro_batches * (pipeline - 1)


def batch_latency_s(
    profile: Profile,
    pipeline: int,
    tensor: int,
    batch: int,
    prefill_micro_batches: int = 1,
    decode_micro_batches: int = 1,
    *,
    output_tokens: int = OUTPUT_TOKENS,
    corrected: bool = False,
) -> float:
    """l_exe of a batch of equal requests. Raises ProfileError for a degree or batch size that was not measured."""
    t1_ms = prefill_ms(profile, pipeline, tensor, batch, prefill_micro_batches, corrected=corrected)
    t2_ms = decode_step_ms(profile, pipeline, tensor, batch, decode_micro_batches)
    return profile.fix_factor * (t1_ms + output_tokens * t2_ms + _head_ms(profile, batch)) / 1000


def solve(
    profile: Profile,
    num_ranks: int,
    required_per_s: float,
    *,
    min_ranks: int,
    max_batch: int,
    output_tokens: int = OUTPUT_TOKENS,
    corrected: bool = False,
) -> PaperConfig | None:
    """Algorithm 1 as the artifact solves it: the least latency of those that reach `required_per_s`, else the most
    throughput; the first of equals. None: fewer than `min_ranks` ranks, no service.
    """
    if num_ranks < min_ranks:
        return None
    configs = list(configurations(profile, num_ranks, min_ranks, max_batch, output_tokens, corrected=corrected))
    enough = [config for config in configs if config.throughput_per_s >= required_per_s]
    if enough:
        return min(enough, key=lambda config: config.latency_s)
    return max(configs, key=lambda config: config.throughput_per_s, default=None)


def configurations(
    profile: Profile, num_ranks: int, min_ranks: int, max_batch: int, output_tokens: int, *, corrected: bool = False
) -> Iterator[PaperConfig]:
    """All that the artifact weighs, in its order: tensor, batch, M1, M2, pipeline, each ascending.

    Pipeline degrees divide the padded number of layers (the number of layers where the profile has no padded one).
    """
    padded = profile.padded_num_layers or profile.num_layers
    for tensor in sorted(profile.degrees):
        pipelines = [p for p in range(math.ceil(min_ranks / tensor), num_ranks // tensor + 1) if p and padded % p == 0]
        for batch in _powers_of_two(max_batch):
            for prefill_micro_batches in _powers_of_two(batch):
                for decode_micro_batches in _powers_of_two(batch):
                    for pipeline in pipelines:
                        latency_s = batch_latency_s(
                            profile,
                            pipeline,
                            tensor,
                            batch,
                            prefill_micro_batches,
                            decode_micro_batches,
                            output_tokens=output_tokens,
                            corrected=corrected,
                        )
                        data = num_ranks // (tensor * pipeline)
                        yield PaperConfig(
                            data=data,
                            pipeline=pipeline,
                            tensor=tensor,
                            batch=batch,
                            prefill_micro_batches=prefill_micro_batches,
                            decode_micro_batches=decode_micro_batches,
                            latency_s=latency_s,
                            throughput_per_s=data * batch / latency_s,
                        )


def steps_within(
    profile: Profile,
    config: PaperConfig,
    slot_s: float,
    *,
    conservative: bool,
    output_tokens: int = OUTPUT_TOKENS,
) -> int:
    """The arranger's S_t: decode steps of a new batch within `slot_s`, 0 (stop now) to `output_tokens` (all of it).

    Before a preemption the estimate is conservative (times with the fix factor, one step less), before an acquisition
    optimistic (times divided by it, one step more).
    """
    scale = profile.fix_factor if conservative else 1 / profile.fix_factor
    shape = (profile, config.pipeline, config.tensor, config.batch)
    t1_ms = prefill_ms(*shape, config.prefill_micro_batches) * scale
    t2_ms = decode_step_ms(*shape, config.decode_micro_batches) * scale
    steps = math.floor((slot_s * 1000 - t1_ms) / t2_ms) + (-1 if conservative else 1)
    return max(0, min(steps, output_tokens))


def _at(profile: Profile, tensor: int, batch: int, field: str) -> float:
    times: DegreeTimes = profile.of_degree(tensor)
    return _of_batch(profile, f"degrees.{tensor}.{field}", times.batch_sizes, getattr(times, field), batch)


def _head_ms(profile: Profile, batch: int) -> float:
    """Of embedding before and head after the layers: counted once a batch, as the artifact does."""
    return _of_batch(profile, "head_ms", profile.head_batch_sizes, profile.head_ms, batch)


def _of_batch(profile: Profile, field: str, batch_sizes: list[int], times_ms: list[float], batch: int) -> float:
    if batch not in batch_sizes:
        has = ", ".join(str(size) for size in batch_sizes)
        raise ProfileError(profile.name, field, f"batch size {batch} was not measured, only {has}")
    return times_ms[batch_sizes.index(batch)]


def _powers_of_two(limit: int) -> list[int]:
    return [1 << exponent for exponent in range(limit.bit_length())] if limit > 0 else []
