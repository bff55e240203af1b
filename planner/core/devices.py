"""GPUs and the instances that carry them: figures from the vendors' data sheets, dense (without sparsity), boost clock.

Sources: NVIDIA's data sheets of T4, L4, A10, V100 SXM2, A100, H100 SXM and H200 SXM; NVIDIA's figures of the A10G;
Amazon EC2's tables of instance types for the network of each. Link rates are of one direction.
"""

from __future__ import annotations

from typing import Final

import msgspec

from planner.errors import ProfileError

PCIE_FRACTION: Final = 0.4
"""Of the rate of PCIe that a ring reaches where GPUs cannot write to each other: through host memory, twice."""
NVLINK_FRACTION: Final = 0.8


class Device(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    flops_per_s: dict[str, float]
    """By dtype; without those that the device does not compute in."""
    memory_bytes_per_s: float
    memory_bytes: int
    intra_bytes_per_s: float
    """Between two ranks of an instance."""
    has_nvlink: bool
    inter_bytes_per_s: float
    """Network of the whole instance."""
    ranks_per_instance: int
    instance_type: str
    """Where network and number of ranks are from."""
    sustained: float = 1.0
    """Of the arithmetic peak that the board's power allows for long: those of 70 W do not hold the boost clock."""

    @property
    def achieved_intra_bytes_per_s(self) -> float:
        return self.intra_bytes_per_s * (NVLINK_FRACTION if self.has_nvlink else PCIE_FRACTION)


def _flops(float32: float, float16: float, bfloat16: float | None = None) -> dict[str, float]:
    """Teraflops."""
    rates = {"float32": float32 * 1e12, "float16": float16 * 1e12}
    return rates if bfloat16 is None else rates | {"bfloat16": bfloat16 * 1e12}


_AMPERE: Final = _flops(19.5, 312, 312)
_HOPPER: Final = _flops(66.9, 989.4, 989.4)
_PCIE3: Final = 15.75e9
_PCIE4: Final = 31.5e9
_GIGABIT: Final = 1e9 / 8

DEVICES: Final = {
    device.name: device
    for device in (
        Device(
            name="T4",
            flops_per_s=_flops(8.1, 65),
            memory_bytes_per_s=320e9,
            memory_bytes=16_000_000_000,
            intra_bytes_per_s=_PCIE3,
            has_nvlink=False,
            inter_bytes_per_s=50 * _GIGABIT,
            ranks_per_instance=4,
            instance_type="g4dn.12xlarge",
            sustained=0.65,
        ),
        Device(
            name="L4",
            flops_per_s=_flops(30.3, 121, 121),
            memory_bytes_per_s=300e9,
            memory_bytes=24_000_000_000,
            intra_bytes_per_s=_PCIE4,
            has_nvlink=False,
            inter_bytes_per_s=40 * _GIGABIT,
            ranks_per_instance=4,
            instance_type="g6.12xlarge",
            sustained=0.65,
        ),
        Device(
            name="A10G",
            flops_per_s=_flops(31.5, 70, 70),
            memory_bytes_per_s=600e9,
            memory_bytes=24_000_000_000,
            intra_bytes_per_s=_PCIE4,
            has_nvlink=False,
            inter_bytes_per_s=40 * _GIGABIT,
            ranks_per_instance=4,
            instance_type="g5.12xlarge",
        ),
        Device(
            name="V100-16",
            flops_per_s=_flops(15.7, 125),
            memory_bytes_per_s=900e9,
            memory_bytes=16_000_000_000,
            intra_bytes_per_s=150e9,
            has_nvlink=True,
            inter_bytes_per_s=10 * _GIGABIT,
            ranks_per_instance=4,
            instance_type="p3.8xlarge",
        ),
        Device(
            name="A100-40",
            flops_per_s=_AMPERE,
            memory_bytes_per_s=1555e9,
            memory_bytes=40_000_000_000,
            intra_bytes_per_s=300e9,
            has_nvlink=True,
            inter_bytes_per_s=400 * _GIGABIT,
            ranks_per_instance=8,
            instance_type="p4d.24xlarge",
        ),
        Device(
            name="A100-80",
            flops_per_s=_AMPERE,
            memory_bytes_per_s=2039e9,
            memory_bytes=80_000_000_000,
            intra_bytes_per_s=300e9,
            has_nvlink=True,
            inter_bytes_per_s=400 * _GIGABIT,
            ranks_per_instance=8,
            instance_type="p4de.24xlarge",
        ),
        Device(
            name="H100",
            flops_per_s=_HOPPER,
            memory_bytes_per_s=3350e9,
            memory_bytes=80_000_000_000,
            intra_bytes_per_s=450e9,
            has_nvlink=True,
            inter_bytes_per_s=3200 * _GIGABIT,
            ranks_per_instance=8,
            instance_type="p5.48xlarge",
        ),
        Device(
            name="H200",
            flops_per_s=_HOPPER,
            memory_bytes_per_s=4800e9,
            memory_bytes=141_000_000_000,
            intra_bytes_per_s=450e9,
            has_nvlink=True,
            inter_bytes_per_s=3200 * _GIGABIT,
            ranks_per_instance=8,
            instance_type="p5en.48xlarge",
        ),
    )
}


def device(name: str) -> Device:
    """Raises ProfileError with the names that there are."""
    found = DEVICES.get(name)
    if found is None:
        raise ProfileError("device", name, f"is none of {', '.join(DEVICES)}")
    return found
