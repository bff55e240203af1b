"""What a message must fulfil before the planner believes it. Each check raises a PlannerError that names the field."""

from __future__ import annotations

import math
from collections.abc import Container

from planner.errors import InventoryError, MessageError
from planner.protocol import EMBEDDING_LAYER, InstanceInventory, LoadReport, PreemptionNotice


def check_inventory(inventory: InstanceInventory, ranks_of_others: Container[str]) -> None:
    """`ranks_of_others`: ranks that other living instances have announced."""
    model, seen = inventory.model, set[str]()
    for rank in inventory.ranks:
        if rank.rank in seen or rank.rank in ranks_of_others:
            raise InventoryError(inventory.instance, "ranks", f"{rank.rank} exists already")
        seen.add(rank.rank)
        for units in rank.units:
            if units.first_layer < EMBEDDING_LAYER or units.last_layer > model.num_layers:
                raise InventoryError(inventory.instance, "units", f"{rank.rank} names layers outside the model")
            if units.first_group < 0 or units.last_group >= model.num_head_groups:
                raise InventoryError(inventory.instance, "units", f"{rank.rank} names groups outside the model")


def check_load(report: LoadReport) -> None:
    """Its numbers are some."""
    for field in ("arrivals_per_s", "mean_prompt_tokens", "mean_output_tokens", "arrivals_cv2"):
        value = getattr(report, field)
        if not (math.isfinite(value) and value >= 0):
            raise MessageError("LoadReport", report.gateway, field, f"{value} is not a number of 0 or more")


def check_notice(notice: PreemptionNotice) -> None:
    """Its deadline is a time."""
    if not math.isfinite(notice.deadline_s):
        raise MessageError("PreemptionNotice", notice.instance, "deadline_s", f"{notice.deadline_s} is not a time")
