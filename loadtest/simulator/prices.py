"""List prices of instance types, as data; every price can be given on the command line."""

from __future__ import annotations

from typing import Final

from loadtest.simulator.scenario import PAPER_PRICES, Prices

SOURCE: Final = (
    "AWS list price in us-east-1, Linux, 2026 (P4, P5 after the cuts of June 2025); spot assumed at 49 % of it, "
    "the share that the SpotServe paper paid, as spot prices change by the hour"
)
ON_DEMAND_PER_H: Final = {
    "g4dn.12xlarge": 3.912,
    "g6.12xlarge": 4.6016,
    "g5.12xlarge": 5.672,
    "p3.8xlarge": 12.24,
    "p4d.24xlarge": 21.9576,
    "p4de.24xlarge": 27.4471,
    "p5.48xlarge": 55.04,
    "p5en.48xlarge": 63.296,
}
SPOT_SHARE: Final = PAPER_PRICES.spot_per_h / PAPER_PRICES.on_demand_per_h


def list_prices(instance_type: str) -> Prices | None:
    """None for a type that the list does not have."""
    on_demand_per_h = ON_DEMAND_PER_H.get(instance_type)
    if on_demand_per_h is None:
        return None
    return Prices(spot_per_h=round(on_demand_per_h * SPOT_SHARE, 4), on_demand_per_h=on_demand_per_h)
