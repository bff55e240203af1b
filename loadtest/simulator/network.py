"""How long bytes take between ranks, instances and disks, with every link used by one flow at a time.

Between instances each instance sends at one rate and receives at the same; inside an instance each rank does; disks are
read at one rate per instance. A receiver takes its flows in the given order. Among the receivers, the flow that can
start first goes first.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from planner.core.links import Links


class Place(NamedTuple):
    """A rank and its instance."""

    instance: str
    rank: str


class Flow(NamedTuple):
    source: Place | None
    """None: the disk of the receiving instance."""
    num_bytes: int


class Network:
    def __init__(self, links: Links) -> None:
        self.links = links
        self._free_at_s: dict[tuple[str, str], float] = defaultdict(float)

    def move(
        self, flows: Mapping[Place, Sequence[Flow]], now_s: float, *, by_s: float | None = None
    ) -> dict[Place, float]:
        """When each receiver has all its flows; the links are busy until then.

        Where anything would come later than `by_s` nothing moves, and the result still says when it would have come.
        """
        begin_s = now_s + self.links.fixed_s
        free_at_s = dict(self._free_at_s)
        done_s = dict.fromkeys(flows, now_s)
        todo = {place: list(reversed(queue)) for place, queue in flows.items() if queue}
        for place in todo:
            done_s[place] = begin_s
        while todo:
            starts = {place: self._start_s(place, queue[-1], done_s[place], free_at_s) for place, queue in todo.items()}
            place = min(starts, key=lambda p: starts[p])
            flow = todo[place].pop()
            end_s = starts[place] + flow.num_bytes / self._rate(place, flow)
            done_s[place] = end_s
            for link in _links(place, flow):
                free_at_s[link] = end_s
            if not todo[place]:
                del todo[place]
        if by_s is None or max(done_s.values(), default=now_s) <= by_s:
            self._free_at_s = defaultdict(float, free_at_s)
        return done_s

    def _start_s(self, place: Place, flow: Flow, after_s: float, free_at_s: Mapping[tuple[str, str], float]) -> float:
        return max(after_s, *(free_at_s.get(link, 0.0) for link in _links(place, flow)))

    def _rate(self, place: Place, flow: Flow) -> float:
        if flow.source is None:
            return self.links.disk_bytes_per_s
        is_inside = flow.source.instance == place.instance
        return self.links.intra_bytes_per_s if is_inside else self.links.inter_bytes_per_s


def _links(place: Place, flow: Flow) -> list[tuple[str, str]]:
    if flow.source is None:
        return [("disk", place.instance)]
    if flow.source.instance == place.instance:
        return [("from rank", flow.source.rank), ("to rank", place.rank)]
    return [("from", flow.source.instance), ("to", place.instance)]
