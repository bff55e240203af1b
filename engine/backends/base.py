"""The seam behind which an engine backend stands: a pipeline, and the context that it lives on.

The seam is a pipeline and not a rank, because some engines own their ranks and scheduler. A backend lives in one rank
process. It prepares a position while another pipeline still serves, starts it, and tells its `PipelineEvents` what
happens. Methods are called from the event loop's thread; events may come from any thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol, runtime_checkable

from engine.core.roles import Position, Unit
from engine.core.scheduler import OutEntry, PullOrder
from engine.core.sequence import SequenceKey
from engine.protocol import GenerateRequest, PullReply, PullRequest, SubmitReply, TokenEntry
from planner.protocol import MeasuredStep, ModelShape, StepProfile, Transfer


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A leader's load, as it stands after its last step."""

    running: int = 0
    waiting: int = 0
    parked: int = 0
    free_slots: int = 0
    total_kv_blocks: int = 0
    free_kv_blocks: int = 0
    cached_kv_blocks: int = 0
    kv_tokens: int = 0
    measured_step: MeasuredStep | None = None


@dataclass(frozen=True, slots=True)
class PrepareReport:
    """What it took to prepare a position."""

    pulled_bytes: int = 0
    disk_bytes: int = 0
    pull_s: float = 0.0
    regroup_s: float = 0.0


class PipelineEvents(Protocol):
    """What a running pipeline tells the rank that runs a part of it."""

    def on_ready(self, pipeline: str, phases_s: Mapping[str, float] = MappingProxyType({})) -> None:
        """All members have started. From then on the leader's part takes requests.

        `phases_s`: seconds of each phase of its start, where an engine had to be built for it.
        """

    def on_entries(self, pipeline: str, entries: list[OutEntry]) -> None:
        """Leader only: everything that one step committed."""

    def on_pull(self, pipeline: str, order: PullOrder) -> None:
        """Leader only: pull, then call `RunningPipeline.pull_done`."""

    def on_stopped(self, pipeline: str, num_parked: int) -> None:
        """It was arranged: the last token is committed; KV of `num_parked` sequences stays until released."""

    def on_broken(self, pipeline: str, cause: str) -> None:
        """A member died, or it was aborted."""

    def on_start_failed(self, pipeline: str, cause: str) -> None:
        """It was prepared, but cannot be started in this shape here; it has ended."""


@runtime_checkable
class RunningPipeline(Protocol):
    """One rank's part of a started pipeline."""

    def abort(self, cause: str) -> None:
        """Give up at once, also when a peer never answers."""


@runtime_checkable
class LedPipeline(RunningPipeline, Protocol):
    """The leader's part: it takes the requests of the whole pipeline."""

    async def submit(self, request: GenerateRequest) -> SubmitReply: ...

    def cancel(self, request_id: str, attempt: int | None = None) -> None:
        """All choices of a request; with `attempt` only those that run as it or as an older one."""

    async def resend(self, request_id: str, choice: int, from_index: int) -> TokenEntry | None:
        """The token log of a sequence from an index on; also after the pipeline has stopped."""

    def pull_done(self, key: SequenceKey, *, ok: bool, pull_s: float) -> None: ...

    def arrange(self, deadline_s: float | None, migration_s: float) -> None:
        """Stop at a token boundary, as late as the deadline allows (None: at the next one)."""

    def carry_on(self) -> None:
        """What `arrange` said does not hold any more; too late if it has stopped."""

    def is_draining(self) -> bool:
        """Told to stop, or stopped."""

    def snapshot(self) -> Snapshot: ...


class Backend(Protocol):
    """A rank's context and its pipelines."""

    @property
    def model(self) -> ModelShape: ...

    @property
    def memory_bytes(self) -> int:
        """For weights and KV together."""

    @property
    def store_address(self) -> str:
        """Where the members of a pipeline that this rank leads meet (`host:port`)."""

    def profile(self) -> StepProfile | None:
        """Step times of this device; blocking. None: they are not known before it runs."""

    def units(self) -> set[Unit]:
        """Weight units held."""

    async def prepare(self, position: Position, transfers: list[Transfer]) -> PrepareReport:
        """Get the units that the position lacks (holders, else disk) and form its process groups.

        Cancel it to give it up: then nothing of it stays but the units that it has got so far.

        Raises:
            EngineError: it cannot be prepared; says why.

        """

    def discard(self, pipeline: str) -> None:
        """Forget a prepared pipeline; its other members hear of it."""

    def start(self, pipeline: str, events: PipelineEvents) -> RunningPipeline:
        """Run a prepared position; the result is a `LedPipeline` where the position leads."""

    async def free_unneeded(self, pipeline: str) -> None:
        """If `pipeline` still runs, free the weights that neither it nor one that is being prepared needs."""

    def ended(self, pipeline: str, num_parked: int) -> None:
        """A pipeline has stopped or broken; the KV of `num_parked` interrupted sequences is kept."""

    async def pull_kv(self, request: PullRequest) -> PullReply:
        """Pull the KV of one sequence, as far as this rank's position needs it.

        Once it has returned, or was cancelled, nothing is written into the blocks any more.
        """

    def release_kv(self, pipeline: str, request_id: str, choice: int) -> None:
        """The KV of an interrupted sequence is not wanted any more."""

    def release_expired(self, now_s: float) -> list[str]:
        """Free KV that nobody came for in time; names the stopped pipelines."""

    def parked(self) -> dict[str, int]:
        """Interrupted sequences whose KV is kept, by stopped pipeline."""

    def export_unit(self, layer: int, group: int) -> bytes: ...

    def export_kv(self, pipeline: str, layer: int, group: int, blocks: list[int], num_tokens: int) -> bytes: ...

    def close(self) -> None: ...
