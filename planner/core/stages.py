"""Split decoder layers over the stages of a pipeline: contiguous, any length, the head's cost on the last stage."""

from __future__ import annotations


def split_layers(num_layers: int, num_stages: int, head_cost_layers: float = 0.0) -> list[tuple[int, int]]:
    """The split whose slowest stage is fastest: (first, last) layer of each stage, inclusive.

    `head_cost_layers` is the time of embedding, head and sampling, counted in decoder layers.
    Raises ValueError unless 1 <= num_stages <= num_layers.
    """
    if not 1 <= num_stages <= num_layers:
        raise ValueError(f"num_stages: {num_stages} stages for {num_layers} layers")
    if num_stages == 1:
        return [(0, num_layers - 1)]
    num_others = num_stages - 1

    def slowest(num_last: int) -> float:
        return max(-(-(num_layers - num_last) // num_others), num_last + head_cost_layers)

    # Among equal splits the one with more layers on the last stage: it leaves the others more even.
    num_last = min(range(1, num_layers - num_others + 1), key=lambda n: (slowest(n), -n))
    each, longer = divmod(num_layers - num_last, num_others)
    stages, first = [], 0
    for size in [each + (index < longer) for index in range(num_others)] + [num_last]:
        stages.append((first, first + size - 1))
        first += size
    return stages
