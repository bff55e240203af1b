"""How a rank gets the weight units that it lacks: from the holders that the plan names, best first, else from disk."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Final, NamedTuple, Protocol

from engine.context.transport import FetchUnits, fetch, in_batches
from engine.core.roles import Position, Unit, transfers_by_unit
from engine.errors import EngineError
from planner.protocol import Transfer

logger = logging.getLogger(__name__)

_FETCH_BATCH_UNITS: Final = 64


class UnitStore(Protocol):
    """Where they go; called in worker threads."""

    def units(self) -> set[Unit]: ...

    def import_unit(self, layer: int, group: int, data: bytes) -> None: ...


class Obtained(NamedTuple):
    pulled_bytes: int
    disk_bytes: int


class UnitPuller:
    """`load` reads a unit from disk into the store, and returns its bytes; called in a worker thread."""

    def __init__(self, rank: str, store: UnitStore, load: Callable[[int, int], int]) -> None:
        self._rank = rank
        self._store = store
        self._load = load

    async def obtain(self, missing: set[Unit], transfers: list[Transfer], position: Position) -> Obtained:
        """Get all of `missing`, which is changed. Raises what `load` raises."""
        sources = {unit: list(names) for unit, names in transfers_by_unit(transfers).items()}
        nowhere = sorted(unit for unit in missing if not sources.get(unit))
        missing.difference_update(nowhere)
        # The disk does not wait for the network.
        loading = asyncio.create_task(asyncio.to_thread(self._load_units, nowhere))
        try:
            pulled_bytes = await self._pull_from_holders(missing, sources, position)
        finally:
            await asyncio.wait({loading})
        disk_bytes = loading.result() + await asyncio.to_thread(self._load_units, sorted(missing))
        return Obtained(pulled_bytes, disk_bytes)

    async def _pull_from_holders(self, missing: set[Unit], sources: dict[Unit, list[str]], position: Position) -> int:
        """Pull what is missing, as far as somebody has it; takes it out of `missing`. Bytes pulled."""
        pulled_bytes = 0
        while True:
            by_holder: dict[str, list[Unit]] = {}
            for unit in sorted(missing):
                if sources.get(unit):
                    by_holder.setdefault(sources[unit][0], []).append(unit)
            if not by_holder:
                return pulled_bytes
            fetched = await asyncio.gather(
                *(self._pull_units(holder, units, position) for holder, units in by_holder.items())
            )
            pulled_bytes += sum(fetched)
            missing.difference_update(self._store.units())
            for unit in missing:  # Whoever did not deliver is not asked again.
                if sources.get(unit):
                    sources[unit].pop(0)

    async def _pull_units(self, holder: str, units: list[Unit], position: Position) -> int:
        address = position.addresses.get(holder)
        num_bytes = 0
        if address is None:
            return 0
        try:
            for start in range(0, len(units), _FETCH_BATCH_UNITS):
                request = FetchUnits(units=units[start : start + _FETCH_BATCH_UNITS])
                async with contextlib.aclosing(in_batches(fetch(holder, address.context_address, request))) as batches:
                    async for batch in batches:
                        num_bytes += await asyncio.to_thread(self._import_units, batch)
        except EngineError as error:
            logger.warning("rank=%s event=pull_failed cause=%s", self._rank, error)
        return num_bytes

    def _import_units(self, batch: list[tuple[Unit, bytes]]) -> int:
        for (layer, group), data in batch:
            self._store.import_unit(layer, group, data)
        return sum(len(data) for _, data in batch)

    def _load_units(self, units: list[Unit]) -> int:
        return sum(self._load(layer, group) for layer, group in units)
