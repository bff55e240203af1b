"""Capacity traces, queries and arrival rates from files. Every error names the file, the line and the field.

Traces, in two forms. The artifact's: one JSON array a line,

    [time_ms, "add" | "remove" | "other" | "DONE", {"nodes": ["node-0", ...], "required_tpt": 0.8}]

and our own: a CSV file (named `.csv`) with this header,

    time_s,event,instance,market
    0,add,a,spot
    600,remove,a,
    1200,end,,

`event` is add (usable from now on), remove (gone; a notice precedes it) or end; `market` is spot or on_demand, and may
be left out (spot) and for `remove`. Times must not go back. Lines at the same time are one event for each market.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgspec

from loadtest.errors import InputError
from loadtest.simulator.scenario import CapacityEvent, CapacityTrace, Request
from planner.protocol import Market

CSV_COLUMNS: Final = ("time_s", "event", "instance", "market")
_JSON_FIELDS: Final = ("time_ms", "operation", "nodes")
_ARTIFACT_OPERATIONS: Final = ("add", "remove", "other", "DONE")


def read_trace(path: Path) -> CapacityTrace:
    """Raises InputError."""
    builder = _Builder(path)
    read = _read_csv if path.suffix.lower() == ".csv" else _read_artifact
    read(path, builder)
    return builder.trace()


def read_requests(path: Path, output_tokens: int) -> tuple[Request, ...]:
    """The artifact's queries: request id, arrival in seconds, prompt tokens, byte offset (not used), without header.

    Raises InputError.
    """
    if output_tokens < 1:
        raise InputError(str(path), None, "output_tokens", f"{output_tokens} is not positive")
    requests: list[Request] = []
    seen: set[int] = set()
    for number, row in _rows(path):
        if len(row) not in (3, 4):
            raise InputError(str(path), number, None, f"{len(row)} fields, not 3 or 4")
        request = Request(
            id=_whole(path, number, "request_id", row[0], 0),
            arrival_s=_number(path, number, "arrival_time_s", row[1]),
            prompt_tokens=_whole(path, number, "prompt_tokens", row[2], 1),
            output_tokens=output_tokens,
        )
        if request.id in seen:
            raise InputError(str(path), number, "request_id", f"{request.id} is there twice")
        if requests and request.arrival_s < requests[-1].arrival_s:
            before_s = requests[-1].arrival_s
            raise InputError(str(path), number, "arrival_time_s", f"time goes back from {before_s} to {row[1]}")
        seen.add(request.id)
        requests.append(request)
    if not requests:
        raise InputError(str(path), None, None, "no requests")
    return tuple(requests)


def read_rates(path: Path) -> tuple[float, ...]:
    """Arrivals a second of each minute: numbers separated by commas or line ends. Raises InputError."""
    rates = []
    for number, row in _rows(path):
        for index, text in enumerate(row):
            if text.strip():
                rates.append(_number(path, number, f"rate {index + 1}", text))
    if not any(rates):
        raise InputError(str(path), None, None, "no rate above 0")
    return tuple(rates)


# --- Traces ---


class _Builder:
    """Checks events as they come, line by line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._events: list[CapacityEvent] = []
        self._alive: set[str] = set()
        self._ever: set[str] = set()
        self._now_s = 0.0
        self._end_s: float | None = None

    def at(self, line: int, field: str, time_s: float) -> None:
        if self._end_s is not None:
            raise InputError(str(self._path), line, field, "the trace has ended before this line")
        if time_s < self._now_s:
            raise InputError(str(self._path), line, field, f"time goes back from {self._now_s:g} to {time_s:g} s")
        self._now_s = time_s

    def add(self, line: int, field: str, names: tuple[str, ...], market: Market) -> None:
        for name in names:
            if name in self._alive:
                raise InputError(str(self._path), line, field, f"{name!r} is added, but it is there already")
            if name in self._ever:
                raise InputError(str(self._path), line, field, f"{name!r} is added again: a new instance, a new name")
            self._alive.add(name)
            self._ever.add(name)
        last = self._events[-1] if self._events else None
        if last is not None and last.at_s == self._now_s and last.added and last.market is market:
            self._events[-1] = msgspec.structs.replace(last, added=(*last.added, *names))
        else:
            self._events.append(CapacityEvent(at_s=self._now_s, added=names, market=market))

    def remove(self, line: int, field: str, names: tuple[str, ...]) -> None:
        for name in names:
            if name not in self._alive:
                was = "it was removed before" if name in self._ever else "it was never added"
                raise InputError(str(self._path), line, field, f"{name!r} is removed, but {was}")
            self._alive.remove(name)
        last = self._events[-1] if self._events else None
        if last is not None and last.at_s == self._now_s and last.removed and not last.added:
            self._events[-1] = msgspec.structs.replace(last, removed=(*last.removed, *names))
        else:
            self._events.append(CapacityEvent(at_s=self._now_s, removed=names))

    def require(self, required_per_s: float) -> None:
        self._events.append(CapacityEvent(at_s=self._now_s, required_per_s=required_per_s))

    def end(self) -> None:
        self._end_s = self._now_s

    def trace(self) -> CapacityTrace:
        if self._end_s is None:
            raise InputError(str(self._path), None, "event", "the trace has no end (artifact: DONE; CSV: end)")
        if not self._ever:
            raise InputError(str(self._path), None, "event", "no instance is ever added")
        if self._end_s <= 0:
            raise InputError(str(self._path), None, "time", "the trace ends at 0 s")
        return CapacityTrace(name=self._path.stem, events=tuple(self._events), end_s=self._end_s)


def _read_artifact(path: Path, builder: _Builder) -> None:
    for number, text in enumerate(_text(path).splitlines(), start=1):
        if not text.strip():
            continue
        time_ms, operation, details = _artifact_line(path, number, text)
        builder.at(number, "time_ms", time_ms / 1000)
        names = _nodes(path, number, details)
        if operation == "add":
            builder.add(number, "nodes", names, Market.SPOT)
        elif operation == "remove":
            builder.remove(number, "nodes", names)
        elif operation == "DONE":
            builder.end()
        required = details.get("required_tpt")
        if required is not None:
            builder.require(_number(path, number, "required_tpt", required))


def _artifact_line(path: Path, number: int, text: str) -> tuple[float, str, dict[str, Any]]:
    try:
        fields = msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        raise InputError(str(path), number, None, f"not JSON: {error}") from error
    if not isinstance(fields, list) or len(fields) != len(_JSON_FIELDS):
        raise InputError(str(path), number, None, "not an array of time_ms, operation and {nodes}")
    time_ms, operation, details = fields
    if operation not in _ARTIFACT_OPERATIONS:
        known = ", ".join(_ARTIFACT_OPERATIONS)
        raise InputError(str(path), number, "operation", f"unknown operation {operation!r}, not one of {known}")
    if not isinstance(details, dict):
        raise InputError(str(path), number, "nodes", "the third element is not an object")
    return _number(path, number, "time_ms", time_ms), operation, details


def _nodes(path: Path, number: int, details: dict[str, Any]) -> tuple[str, ...]:
    nodes = details.get("nodes", [])
    if not isinstance(nodes, list) or not all(isinstance(name, str) and name for name in nodes):
        raise InputError(str(path), number, "nodes", "not a list of names")
    return tuple(nodes)


def _read_csv(path: Path, builder: _Builder) -> None:
    rows = _rows(path)
    number, header = next(rows, (1, []))
    if tuple(name.strip() for name in header) != CSV_COLUMNS:
        raise InputError(str(path), number, "header", f"must be {','.join(CSV_COLUMNS)}")
    for number, row in rows:
        if len(row) > len(CSV_COLUMNS) or len(row) < 2:
            raise InputError(str(path), number, None, f"{len(row)} fields, not {len(CSV_COLUMNS)}")
        time_s, event, instance, market = [*(field.strip() for field in row), "", ""][:4]
        builder.at(number, "time_s", _number(path, number, "time_s", time_s))
        if event not in ("add", "remove", "end"):
            raise InputError(str(path), number, "event", f"unknown event {event!r}, not one of add, remove, end")
        if event != "end" and not instance:
            raise InputError(str(path), number, "instance", "is empty")
        if event == "add":
            builder.add(number, "instance", (instance,), _market(path, number, market))
        elif event == "remove":
            builder.remove(number, "instance", (instance,))
        else:
            builder.end()


def _market(path: Path, number: int, text: str) -> Market:
    try:
        return Market(text) if text else Market.SPOT
    except ValueError:
        known = ", ".join(Market)
        raise InputError(str(path), number, "market", f"unknown market {text!r}, not one of {known}") from None


# --- Fields ---


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(str(path), None, None, error.strerror or str(error)) from error
    except UnicodeDecodeError as error:
        raise InputError(str(path), None, None, f"not UTF-8: {error}") from error


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line number, fields) of each line that is not empty; `#` begins a comment line."""
    reader = csv.reader(_text(path).splitlines())
    for row in reader:
        if any(field.strip() for field in row) and not row[0].lstrip().startswith("#"):
            yield reader.line_num, row


def _number(path: Path, line: int, field: str, value: object) -> float:
    """Finite and not negative."""
    is_number = isinstance(value, int | float | str) and not isinstance(value, bool)
    try:
        number = float(value) if is_number else math.nan  # type: ignore[arg-type]  # is_number says so
    except ValueError:
        number = math.nan
    if math.isnan(number) or math.isinf(number):
        raise InputError(str(path), line, field, f"{value!r} is not a number")
    if number < 0:
        raise InputError(str(path), line, field, f"{value} is negative")
    return number


def _whole(path: Path, line: int, field: str, text: str, at_least: int) -> int:
    try:
        number = int(text)
    except ValueError:
        raise InputError(str(path), line, field, f"{text!r} is not a whole number") from None
    if number < at_least:
        raise InputError(str(path), line, field, f"{number} is below {at_least}")
    return number
