from __future__ import annotations


class Mapping:
    """Which part of the model a rank has: ranks of a tensor group are neighbours, stages follow each other."""

    def __init__(
        self, world_size: int = 1, rank: int = 0, gpus_per_node: int = 8, tp_size: int = 1, pp_size: int = 1
    ) -> None:
        if world_size != tp_size * pp_size:
            raise ValueError(
                f"world_size must equal to tp_size * pp_size, but got {world_size} != {tp_size} * {pp_size}"
            )
        self.world_size = world_size
        self.rank = rank
        self.gpus_per_node = gpus_per_node
        self.tp_size = tp_size
        self.pp_size = pp_size
        self.cp_size = 1
        self.pp_partition: list[int] | None = None

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp_size

    @property
    def pp_rank(self) -> int:
        return self.rank // self.tp_size

    def is_first_pp_rank(self) -> bool:
        return self.pp_rank == 0

    def is_last_pp_rank(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    def pp_layers(self, num_layers: int) -> list[int]:
        if self.pp_partition is not None:
            if sum(self.pp_partition) != num_layers or len(self.pp_partition) != self.pp_size:
                raise ValueError(f"pp_partition {self.pp_partition} does not fit {num_layers} layers")
            start = sum(self.pp_partition[: self.pp_rank])
            return list(range(start, start + self.pp_partition[self.pp_rank]))
        base, extra = divmod(num_layers, self.pp_size)  # The first stages get one more.
        start = self.pp_rank * base + min(self.pp_rank, extra)
        return list(range(start, start + base + (self.pp_rank < extra)))
