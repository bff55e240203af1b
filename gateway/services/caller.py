"""Who asks, and for how long: set before a request's handler runs, read when the request is admitted.

A context variable, since every request runs in a task (and so in a context) of its own, and no function between the two
has anything to do with it.
"""

from __future__ import annotations

from contextvars import ContextVar

import msgspec

from gateway.core.keys import ANONYMOUS, Principal


class Caller(msgspec.Struct, frozen=True):
    principal: Principal = ANONYMOUS
    timeout_s: float | None = None
    """Of the whole request; None: the gateway's."""


current_caller: ContextVar[Caller] = ContextVar("caller", default=Caller())  # noqa: B039  frozen
