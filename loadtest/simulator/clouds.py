"""Instance types that a what-if rents: devices, prices, links. Data; every price can be given on the command line."""

from __future__ import annotations

from typing import Final

import msgspec

from loadtest.simulator.scenario import PAPER_PRICES, Prices

SOURCE: Final = (
    "AWS list prices in us-east-1, Linux, of 2026 (P4 and P5 after the reductions of June 2025). Spot prices "
    "change by the hour and are assumed at 49 % of on-demand, the share that the SpotServe paper paid: give --prices."
)
SPOT_SHARE: Final = PAPER_PRICES.spot_per_h / PAPER_PRICES.on_demand_per_h
DISK_BYTES_PER_S: Final = 1e9
"""Assumed: weights from the instance's NVMe disk, or from storage in the same region."""


class InstanceType(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    device: str
    """As `planner.core.roofline` calls it."""
    num_devices: int
    on_demand_per_h: float
    network_gbit_per_s: float

    @property
    def prices(self) -> Prices:
        return Prices(spot_per_h=round(self.on_demand_per_h * SPOT_SHARE, 4), on_demand_per_h=self.on_demand_per_h)

    @property
    def network_bytes_per_s(self) -> float:
        return self.network_gbit_per_s / 8 * 1e9


def _type(name: str, device: str, num_devices: int, on_demand_per_h: float, network_gbit_per_s: float) -> InstanceType:
    return InstanceType(
        name=name,
        device=device,
        num_devices=num_devices,
        on_demand_per_h=on_demand_per_h,
        network_gbit_per_s=network_gbit_per_s,
    )


INSTANCE_TYPES: Final = (
    _type("g4dn.12xlarge", "T4", 4, 3.912, 50),
    _type("g6.12xlarge", "L4", 4, 4.6016, 40),
    _type("g5.12xlarge", "A10G", 4, 5.672, 40),
    _type("p4d.24xlarge", "A100-40GB", 8, 21.9576, 400),
    _type("p4de.24xlarge", "A100-80GB", 8, 27.4471, 400),
    _type("p5.48xlarge", "H100", 8, 55.04, 3200),
    _type("p5en.48xlarge", "H200", 8, 63.296, 3200),
)


def instance_type_with(device: str) -> InstanceType:
    """The one that is rented for `device`. Raises KeyError if there is none."""
    return {found.device: found for found in INSTANCE_TYPES}[device]
