"""What a message must fulfil before the planner believes it. Each check raises a PlannerError that names the field."""

from __future__ import annotations

import math
from collections.abc import Container
from typing import Final

from planner.errors import InventoryError, MessageError
from planner.protocol import EMBEDDING_LAYER, InstanceInventory, LoadReport, PreemptionNotice, RankInventory

_LEAST_OF_MODEL: Final = {
    "num_layers": 1,
    "num_head_groups": 1,
    "decoder_unit_bytes": 1,
    "embedding_unit_bytes": 0,
    "head_unit_bytes": 0,
    "kv_unit_bytes_per_token": 1,
    "kv_block_tokens": 1,
    "max_model_len": 1,
    "hidden_bytes_per_token": 0,
}


def check_inventory(inventory: InstanceInventory, ranks_of_others: Container[str]) -> None:
    """`ranks_of_others`: ranks that other living instances have announced."""
    model, seen = inventory.model, set[str]()
    for field, least in _LEAST_OF_MODEL.items():
        if getattr(model, field) < least:
            raise InventoryError(inventory.instance, f"model.{field}", f"{getattr(model, field)} is below {least}")
    for rank in inventory.ranks:
        _check_numbers(inventory.instance, rank)
        if rank.rank in seen or rank.rank in ranks_of_others:
            raise InventoryError(inventory.instance, "ranks", f"{rank.rank} exists already")
        seen.add(rank.rank)
        for units in rank.units:
            if units.first_layer > units.last_layer or units.first_group > units.last_group:
                raise InventoryError(
                    inventory.instance, "units", f"{rank.rank} names a range that ends before it begins"
                )
            if units.first_layer < EMBEDDING_LAYER or units.last_layer > model.num_layers:
                raise InventoryError(inventory.instance, "units", f"{rank.rank} names layers outside the model")
            if units.first_group < 0 or units.last_group >= model.num_head_groups:
                raise InventoryError(inventory.instance, "units", f"{rank.rank} names groups outside the model")


def _check_numbers(instance: str, rank: RankInventory) -> None:
    numbers: dict[str, float] = {name: getattr(rank, name) for name in ("memory_bytes", "kv_tokens", "rebuild_s")}
    if rank.measured_step is not None:
        names = ("num_sequences", "mean_step_ms", "num_steps", "mean_context_tokens")
        numbers |= {f"measured_step.{name}": getattr(rank.measured_step, name) for name in names}
    for field, value in numbers.items():
        if not _is_amount(value):
            raise InventoryError(instance, field, f"{value} of {rank.rank} is not a number of 0 or more")


def check_load(report: LoadReport) -> None:
    """Its numbers are some."""
    fields = ("arrivals_per_s", "running", "waiting", "mean_prompt_tokens", "mean_output_tokens", "arrivals_cv2")
    for field in fields:
        value = getattr(report, field)
        if not _is_amount(value):
            raise MessageError("LoadReport", report.gateway, field, f"{value} is not a number of 0 or more")


def check_notice(notice: PreemptionNotice) -> None:
    """Its deadline is a time."""
    if not math.isfinite(notice.deadline_s):
        raise MessageError("PreemptionNotice", notice.instance, "deadline_s", f"{notice.deadline_s} is not a time")


def _is_amount(value: float) -> bool:
    return math.isfinite(value) and value >= 0
