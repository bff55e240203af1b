"""What the command line and the one-machine supervisor say to each other over NATS. Imports msgspec only."""

from __future__ import annotations

from planner.protocol import Market, Message


class PreemptCommand(Message, frozen=True, kw_only=True):
    """Play the cloud: notice now, SIGKILL of the whole instance after `notice_s`."""

    instance: str
    notice_s: float = 30.0


class CancelNoticeCommand(Message, frozen=True, kw_only=True):
    """Play the cloud that changes its mind: the notice is taken back, the instance stays."""

    instance: str


class KillCommand(Message, frozen=True, kw_only=True):
    """SIGKILL of the whole instance now, with no notice."""

    instance: str


class AddCommand(Message, frozen=True, kw_only=True):
    market: Market | None = None
    """None: the market that `up` was started with."""


class CommandReply(Message, frozen=True, kw_only=True):
    ok: bool
    message: str


def supervisor_subject(model: str) -> str:
    """Where the supervisor listens for commands (request/reply)."""
    return f"spotserve.{model}.supervisor.command"
