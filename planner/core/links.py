"""How fast context moves: between instances, inside one, and from disk."""

from __future__ import annotations

import msgspec


class Links(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes a second in one direction; `inter` and `disk` are of a whole instance, `intra` of one rank."""

    inter_bytes_per_s: float
    intra_bytes_per_s: float
    disk_bytes_per_s: float
    fixed_s: float = 0.2
    """Messages and connections of a migration, beside its bytes."""

    def __post_init__(self) -> None:
        for name in ("inter_bytes_per_s", "intra_bytes_per_s", "disk_bytes_per_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: must be positive, got {getattr(self, name)}")


def uniform_links(bytes_per_s: float) -> Links:
    """Where only one rate is known: what a `StepProfile` measured."""
    return Links(inter_bytes_per_s=bytes_per_s, intra_bytes_per_s=bytes_per_s, disk_bytes_per_s=bytes_per_s)
