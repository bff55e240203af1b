"""Whose failure it is when several requests fall at once. Pure.

An exception in the forward pass fails every active request with one and the same RequestError. Who fell begins again
one by one, each beside those that are cleared: a token clears the request that is on trial, and shows that the engine
lives. Who falls on trial is accused, and convicted by the next token of any request; if a second one falls before
that, or nobody is left to give a token, it is the engine.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final, NamedTuple

from engine.core.sequence import Sequence, SequenceKey

AGAIN_S: Final = 60.0
"""Two failures of untried requests within this time are the engine's end."""


class Accused(NamedTuple):
    sequence: Sequence
    error: str


class Trial:
    """What has fallen together and is not cleared; it is not in the engine, but for the one on trial."""

    def __init__(self) -> None:
        self.suspects: OrderedDict[SequenceKey, Sequence] = OrderedDict()
        self.accused: dict[SequenceKey, Accused] = {}
        self.on_trial: SequenceKey | None = None
        self._fell_s: float | None = None

    @property
    def is_open(self) -> bool:
        return bool(self.suspects or self.accused or self.on_trial)

    def find(self, key: SequenceKey) -> Sequence | None:
        """A sequence that is held here, and not in the engine."""
        accused = self.accused.get(key)
        return accused.sequence if accused is not None else self.suspects.get(key)

    def held(self) -> list[Sequence]:
        return [*(accused.sequence for accused in self.accused.values()), *self.suspects.values()]

    def remove(self, key: SequenceKey) -> None:
        """It has ended, or is not wanted any more."""
        self.suspects.pop(key, None)
        self.accused.pop(key, None)
        if self.on_trial == key:
            self.on_trial = None

    def fell(self, sequences: list[Sequence], error: str, now_s: float) -> str | None:
        """Several fell together, or the one on trial did. Why the engine counts as dead now; None if it does not."""
        tried = self.on_trial
        self.on_trial = None
        for sequence in reversed(sequences):
            if sequence.key == tried:
                self.accused[tried] = Accused(sequence, error)
            else:  # Those that were cleared go first.
                self.suspects[sequence.key] = sequence
                self.suspects.move_to_end(sequence.key, last=False)
        if tried is None or tried not in self.accused:
            before_s, self._fell_s = self._fell_s, now_s
            if before_s is not None and now_s - before_s < AGAIN_S:
                return f"forward passes failed twice in {now_s - before_s:.1f} s: {error}"
        elif len(self.accused) > 1 or not self.suspects:
            return f"forward passes fail whoever is in them: {error}"
        return None

    def moved(self, key: SequenceKey) -> list[Accused]:
        """The engine has given a sequence something: who is convicted by that, and is to be removed."""
        if self.on_trial == key:
            self.on_trial = None
        return list(self.accused.values())

    def next(self) -> Sequence | None:
        """Who begins now, if nobody is on trial."""
        if self.on_trial is not None or not self.suspects:
            return None
        self.on_trial, sequence = self.suspects.popitem(last=False)
        return sequence
