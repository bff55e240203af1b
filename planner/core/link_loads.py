"""How long what moves takes on the links that it takes, step by step: every link works through its bytes in order."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from planner.core.links import Links

FROM_DISK = -1


class Load(msgspec.Struct, frozen=True):
    """Bytes that `receiver` gets from `source` (numbers of ranks, or `FROM_DISK`) in each of `steps`."""

    receiver: int
    source: int
    steps: Sequence[int]
    step_bytes: Sequence[float]


class LinkLoads:
    """Each instance has a link in, a link out and a disk; each rank a link in and out to the others of its instance."""

    def __init__(self, links: Links, instance_of: Sequence[int], loads: Sequence[Load], num_steps: int) -> None:
        self._instance_of = np.array(instance_of, dtype=np.int64)
        num_instances, num_ranks = max(instance_of, default=-1) + 1, len(instance_of)
        # Numbers of links: out of instances, into instances, disks, out of ranks, into ranks.
        self._first_intra = 3 * num_instances
        self._num_instances, self._num_ranks = num_instances, num_ranks
        rates = [links.inter_bytes_per_s] * 2 * num_instances + [links.disk_bytes_per_s] * num_instances
        rates += [links.intra_bytes_per_s] * 2 * num_ranks
        self._out, self._in = self._links_of(loads)
        counts = [len(load.steps) for load in loads]
        steps = np.array([step for load in loads for step in load.steps], dtype=np.int64)
        sizes = np.array([size for load in loads for size in load.step_bytes], dtype=np.float64)
        busy_bytes = np.zeros(len(rates) * num_steps)
        for of_load in (self._out, self._in):
            cells = np.repeat(of_load, counts) * num_steps + steps
            busy_bytes += np.bincount(cells, weights=sizes, minlength=len(busy_bytes))
        # From disk a load takes one link only.
        from_disk = np.repeat(self._out == self._in, counts)
        cells = np.repeat(self._in, counts)[from_disk] * num_steps + steps[from_disk]
        busy_bytes -= np.bincount(cells, weights=sizes[from_disk], minlength=len(busy_bytes))
        self.busy_s = busy_bytes.reshape(len(rates), num_steps) / np.array(rates)[:, None]
        """By link and step."""
        self._done_s = np.cumsum(self.busy_s, axis=1)
        self._last_steps = np.array([max(load.steps) for load in loads], dtype=np.int64)

    @property
    def seconds(self) -> float:
        """Until the busiest link is done."""
        return float(self._done_s[:, -1].max(initial=0.0))

    def arrival_s(self) -> NDArray[np.float64]:
        """When each load is in: both its links have done all steps up to its last one."""
        of_out = self._done_s[self._out, self._last_steps]
        result: NDArray[np.float64] = np.maximum(of_out, self._done_s[self._in, self._last_steps])
        return result

    def _links_of(self, loads: Sequence[Load]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        receivers = np.array([load.receiver for load in loads], dtype=np.int64)
        sources = np.array([load.source for load in loads], dtype=np.int64)
        to, come_from = self._instance_of[receivers], self._instance_of[sources]
        is_disk, is_near = sources == FROM_DISK, come_from == to
        disk = 2 * self._num_instances + to
        out = np.where(is_near, self._first_intra + sources, come_from)
        into = np.where(is_near, self._first_intra + self._num_ranks + receivers, self._num_instances + to)
        return np.where(is_disk, disk, out), np.where(is_disk, disk, into)
