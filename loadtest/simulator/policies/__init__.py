"""How a fleet can be run on a capacity trace: ours, the paper's, and its baselines."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

from loadtest.simulator.policies.base import Policy
from loadtest.simulator.policies.mixed import SpotServeMixed
from loadtest.simulator.policies.on_demand import OnDemand
from loadtest.simulator.policies.paper import RUNS, PaperPolicy
from loadtest.simulator.policies.replicas import Replicas
from loadtest.simulator.policies.rerouting_strong import ReroutingStrong
from loadtest.simulator.policies.spotserve import SpotServe

POLICIES: Final[dict[str, Callable[[], Policy]]] = {
    "spotserve": SpotServe,
    "spotserve-mixed": SpotServeMixed,
    **{name: partial(PaperPolicy, name) for name in RUNS},
    "rerouting-strong": ReroutingStrong,
    "replicas": Replicas,
    "on-demand": OnDemand,
}
"""By the names that the command line knows, in the order of reports."""
