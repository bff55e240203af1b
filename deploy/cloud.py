"""Plays the cloud on one machine: launches instances, gives notices, takes instances away."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from deploy.bus import Command, FleetBus
from deploy.default_model import Say
from deploy.errors import CommandError
from deploy.process import Child, describe_exit
from deploy.protocol import AddCommand, CancelNoticeCommand, CommandReply, KillCommand, PreemptCommand
from planner.protocol import (
    InstanceLost,
    InstanceRequested,
    InstanceStarting,
    Market,
    NoticeCancelled,
    PreemptionNotice,
)

Launch = Callable[[str, Market], Awaitable[Child]]


class Instance:
    """One launched instance, until its process has ended."""

    def __init__(self, id_: str, market: Market, child: Child) -> None:
        self.id = id_
        self.market = market
        self.child = child
        self.lost_reason: str | None = None
        """Why the cloud took it away; None if it ended by itself."""
        self.deadline_s: float | None = None
        self.timer: asyncio.TimerHandle | None = None

    def take_away(self, reason: str) -> None:
        """SIGKILL of agent and ranks; the watcher of its process does the rest."""
        self.lost_reason = reason
        if self.timer is not None:
            self.timer.cancel()
        self.child.signal_kill()


class LocalCloud:
    """The fleet of one `up`. `launch` starts the process of an instance, `take_id` gives an unused id."""

    def __init__(
        self,
        bus: FleetBus,
        launch: Launch,
        take_id: Callable[[], str],
        default_market: Market,
        ranks_per_instance: int,
        say: Say,
    ) -> None:
        self._bus = bus
        self._launch = launch
        self._take_id = take_id
        self._default_market = default_market
        self._ranks_per_instance = ranks_per_instance
        self._say = say
        self._watchers: set[asyncio.Task[None]] = set()
        self.instances: dict[str, Instance] = {}

    async def add(self, market: Market | None = None) -> str:
        """Launch one more instance; returns its id. Raises CommandError."""
        id_, market = self._take_id(), market or self._default_market
        self._bus.post(InstanceRequested(instance=id_, market=market, num_ranks=self._ranks_per_instance))
        try:
            instance = Instance(id_, market, await self._launch(id_, market))
        except OSError as error:
            self._bus.post(InstanceLost(instance=id_, reason=f"cannot be started: {error}", detected_at_s=time.time()))
            raise CommandError(f"{id_} cannot be started: {error}") from error
        self._bus.post(InstanceStarting(instance=id_, market=market, num_ranks=self._ranks_per_instance))
        self.instances[id_] = instance
        watcher = asyncio.create_task(self._watch(instance))
        self._watchers.add(watcher)
        watcher.add_done_callback(self._watchers.discard)
        return id_

    async def preempt(self, id_: str, notice_s: float) -> None:
        """Give notice, and take the instance away when it has passed; raises CommandError."""
        instance = self._find(id_)
        if instance.deadline_s is not None:
            left_s = instance.deadline_s - time.time()
            raise CommandError(
                f"{id_} is under notice already: it goes in {left_s:.0f} s (`spotserve kill` ends it now)"
            )
        if not 0 <= notice_s < float("inf"):
            raise CommandError(f"a notice of {notice_s} s: it must be 0 s or more")
        instance.deadline_s = time.time() + notice_s
        # Armed before the notice is out, and kept if NATS does not take it: the cloud does not wait for us either.
        instance.timer = asyncio.get_running_loop().call_later(notice_s, instance.take_away, "preempted")
        self._say(f"{id_}: preemption notice, it goes in {notice_s:g} s")
        await self._bus.publish(PreemptionNotice(instance=id_, deadline_s=instance.deadline_s))

    async def cancel_notice(self, id_: str) -> None:
        """Take the notice back, and let the instance live; raises CommandError."""
        instance = self._find(id_)
        if instance.deadline_s is None:
            raise CommandError(f"{id_} is under no notice that could be cancelled")
        if instance.timer is not None:
            instance.timer.cancel()
        instance.deadline_s = instance.timer = None
        self._say(f"{id_}: the preemption notice is cancelled, it stays")
        await self._bus.publish(NoticeCancelled(instance=id_))

    def kill(self, id_: str) -> None:
        """SIGKILL without notice; raises CommandError."""
        self._find(id_).take_away("killed")

    async def handle(self, command: Command) -> CommandReply:
        """Carry out a command of the command line."""
        try:
            return CommandReply(ok=True, message=await self._carry_out(command))
        except CommandError as error:
            return CommandReply(ok=False, message=str(error))

    async def _carry_out(self, command: Command) -> str:
        match command:
            case PreemptCommand():
                await self.preempt(command.instance, command.notice_s)
                return f"{command.instance} has notice: it is taken away in {command.notice_s:g} s"
            case CancelNoticeCommand():
                await self.cancel_notice(command.instance)
                return f"{command.instance} stays: its notice is cancelled"
            case KillCommand():
                self.kill(command.instance)
                return f"{command.instance} is killed"
            case AddCommand():
                return f"{await self.add(command.market)} is starting"

    async def stop(self, grace_s: float) -> None:
        """End all instances without telling anybody: the fleet ends with them."""
        for watcher in self._watchers:
            watcher.cancel()
        for instance in self.instances.values():
            if instance.timer is not None:
                instance.timer.cancel()
        await asyncio.gather(*(instance.child.stop(grace_s) for instance in self.instances.values()))

    def _find(self, id_: str) -> Instance:
        if id_ not in self.instances:
            running = ", ".join(self.instances) or "none"
            raise CommandError(f"no instance {id_!r} is running here; running: {running}")
        return self.instances[id_]

    async def _watch(self, instance: Instance) -> None:
        """Wait for the end of an instance, whoever caused it, and tell the planner."""
        returncode = await instance.child.wait()
        detected_at_s = time.time()
        instance.child.signal_kill()  # ranks that outlived their agent
        del self.instances[instance.id]
        if instance.timer is not None:
            instance.timer.cancel()
        reason = instance.lost_reason
        if reason is None:
            reason = f"the agent {describe_exit(returncode)}{instance.child.last_words()}"
        self._bus.post(InstanceLost(instance=instance.id, reason=reason, detected_at_s=detected_at_s))
        hint = "" if instance.lost_reason else f"; its log: {instance.child.log}"
        self._say(f"{instance.id}: lost, {reason}{hint}")
