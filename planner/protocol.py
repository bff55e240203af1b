"""Wire types and NATS subjects that the planner owns. Imports msgspec only.

Vocabulary: a model with V KV heads is cut into V head groups. The unit of context is (layer, head group).
Layer numbers: decoder layers are 0 .. num_layers-1, the embedding is layer -1 (`EMBEDDING_LAYER`), and the output
head (final norm, and the vocabulary rows where the head is not tied to the embedding) is layer `num_layers`.
A tied model's last stage therefore needs the embedding units as well as the head units.

All ranges are inclusive on both ends. All times named `_s` that are points in time are Unix seconds.
New fields get defaults and the type of a field never changes, so that versions can be mixed while a fleet is updated.
"""

from __future__ import annotations

import zlib
from enum import StrEnum
from typing import Final

import msgspec

SCHEMA_VERSION: Final = 1
EMBEDDING_LAYER: Final = -1

TAG_FIELD: Final = "type"


class Wire(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of every message and of every part of one."""


class Message(Wire, frozen=True, kw_only=True, tag=True, tag_field=TAG_FIELD):
    """Base of a message that travels on its own; its class name is its tag on the wire."""


# --- Large messages --------------------------------------------------------------------------------------------

COMPRESS_FROM_BYTES: Final = 256 * 1024
"""A plan grows with the fleet (about 650 bytes a rank), and NATS refuses messages above 1 MB unless it is told
otherwise. Compressed, a plan for 4,096 ranks takes 0.35 MB."""
_ZLIB: Final = b"\x78"
"""How zlib's data begin; no message does, in msgpack."""


def packed(payload: bytes) -> bytes:
    """An encoded message as it is sent: a large one compressed."""
    return payload if len(payload) < COMPRESS_FROM_BYTES else zlib.compress(payload, 1)


def unpacked(payload: bytes) -> bytes:
    """What `packed` was given. Every reader of plans and of the planner's status calls it before it decodes.

    Raises msgspec.DecodeError if the compressed data are damaged.
    """
    if not payload.startswith(_ZLIB):
        return payload
    try:
        return zlib.decompress(payload)
    except zlib.error as error:
        raise msgspec.DecodeError(f"compressed data are damaged: {error}") from error


# --- The model and the fleet -----------------------------------------------------------------------------------


class ModelShape(Wire, frozen=True, kw_only=True):
    """What the planner must know of a model; computed by the engine from config.json."""

    name: str
    num_layers: int
    num_head_groups: int
    decoder_unit_bytes: int
    """Weights of one (decoder layer, head group)."""
    embedding_unit_bytes: int
    head_unit_bytes: int
    kv_unit_bytes_per_token: int
    """K and V of one token in one (decoder layer, head group)."""
    kv_block_tokens: int
    max_model_len: int
    hidden_bytes_per_token: int
    """One token's activation between two stages."""
    tied_embeddings: bool

    def unit_bytes(self, layer: int) -> int:
        """Bytes of one weight unit of `layer`."""
        if layer == EMBEDDING_LAYER:
            return self.embedding_unit_bytes
        return self.head_unit_bytes if layer == self.num_layers else self.decoder_unit_bytes

    def layers_of_stage(self, first_layer: int, last_layer: int) -> list[int]:
        """All layers whose units a stage of decoder layers first..last needs (embedding and head included)."""
        layers = list(range(first_layer, last_layer + 1))
        is_first, is_last = first_layer == 0, last_layer == self.num_layers - 1
        if is_first or (is_last and self.tied_embeddings):
            layers.insert(0, EMBEDDING_LAYER)
        if is_last:
            layers.append(self.num_layers)
        return layers


class UnitRange(Wire, frozen=True, kw_only=True):
    """A rectangle of units: layers x head groups, both inclusive."""

    first_layer: int
    last_layer: int
    first_group: int
    last_group: int

    def layers(self) -> range:
        return range(self.first_layer, self.last_layer + 1)

    def units(self) -> set[tuple[int, int]]:
        """The (layer, head group) pairs of this rectangle."""
        return {
            (layer, group)
            for layer in range(self.first_layer, self.last_layer + 1)
            for group in range(self.first_group, self.last_group + 1)
        }


class Market(StrEnum):
    SPOT = "spot"
    ON_DEMAND = "on_demand"


class InstanceState(StrEnum):
    REQUESTED = "requested"
    """Asked of the cloud, not launched yet."""
    STARTING = "starting"
    READY = "ready"
    GRACE = "grace"
    """Under a preemption notice: it serves and sends its context until its deadline."""
    LOST = "lost"


class StepProfile(Wire, frozen=True, kw_only=True):
    """Measured step times of one rank that holds whole layers (tensor degree 1).

    `decode_layer_ms[i]` is one decoder layer's time for a decode step of `batch_sizes[i]` sequences.
    """

    batch_sizes: list[int]
    decode_layer_ms: list[float]
    decode_head_ms: list[float]
    """Embedding, final norm, output head and sampling, per step of `batch_sizes[i]` sequences."""
    prefill_layer_ms_per_token: float
    stage_hop_ms: float
    """Passing activations to the next stage."""
    all_reduce_ms: float
    """One all-reduce of a decode step among two ranks of a tensor group."""
    transfer_bytes_per_s: float
    device: str = "cpu"
    dtype: str = "float32"


class MeasuredStep(Wire, frozen=True, kw_only=True):
    """Means over the last window of steps of a running pipeline in which every sequence only decoded."""

    num_sequences: float
    mean_step_ms: float
    """Until every sequence had its next token."""
    num_steps: int
    """Counted by the pipeline so far: tells a new window from one that is repeated."""
    mean_context_tokens: float = 0.0


class RankInventory(Wire, frozen=True, kw_only=True):
    """What one rank is, and which context it really holds: the truth that matching starts from."""

    rank: str
    """`<instance>-<index>`; free of dots, so that it can be a NATS subject token."""
    device: str
    memory_bytes: int
    """For weights and KV together."""
    context_address: str
    """`host:port` of the rank's context service (plain bytes of units)."""
    store_address: str
    """`host:port` of the rank's rendezvous store, used by the pipelines that this rank leads."""
    units: list[UnitRange] = []
    pipeline: str | None = None
    """The pipeline that it runs now."""
    prepared: list[str] = []
    """Pipelines that it holds ready to start (weights in, group formed)."""
    kv_tokens: int = 0
    """Tokens of live sequences whose KV it holds."""
    measured_step: MeasuredStep | None = None
    """Of the pipeline that it leads, once it has decoded enough."""
    rebuild_s: float = 0.0
    """From the end of one pipeline to the start of the next on it, weights apart; 0: pipelines change in no time."""


class InstanceInventory(Message, frozen=True, kw_only=True):
    """KV `inventory.<instance>` (with a TTL), and the same on the core subject: at start, on change, and every 2 s."""

    instance: str
    market: Market
    liveness_address: str
    """`host:port` that accepts a connection for as long as the instance lives, and writes a byte every 0.5 s."""
    model: ModelShape
    ranks: list[RankInventory]
    profile: StepProfile | None = None
    epoch: int = 0
    """The newest plan that the instance has seen."""
    version: int = SCHEMA_VERSION


class InstanceRequested(Message, frozen=True, kw_only=True):
    """`capacity.<instance>`: the cloud has been asked for it; it may never come."""

    instance: str
    market: Market
    num_ranks: int = 1


class InstanceStarting(Message, frozen=True, kw_only=True):
    """`capacity.<instance>`: somebody has launched it; it will join when its ranks are up."""

    instance: str
    market: Market
    num_ranks: int = 1


class PreemptionNotice(Message, frozen=True, kw_only=True):
    """`capacity.<instance>`: the cloud takes the instance away at `deadline_s`; a later one may move it."""

    instance: str
    deadline_s: float


class NoticeCancelled(Message, frozen=True, kw_only=True):
    """`capacity.<instance>`: the cloud leaves the instance to us after all."""

    instance: str


class InstanceLost(Message, frozen=True, kw_only=True):
    """`capacity.<instance>`: it is gone (seen by the supervisor, by a peer, or by the planner's liveness watch)."""

    instance: str
    reason: str
    detected_at_s: float = 0.0


class LoadReport(Message, frozen=True, kw_only=True):
    """`load.<gateway>`, 1 Hz."""

    gateway: str
    arrivals_per_s: float
    """Over the last 30 s."""
    running: int
    waiting: int
    mean_prompt_tokens: float = 0.0
    mean_output_tokens: float = 0.0
    arrivals_cv2: float = 1.0
    """Squared coefficient of variation of the gaps between arrivals of the last minutes: 0 evenly spaced, 1 at random
    (Poisson), more in bursts."""


# --- The plan --------------------------------------------------------------------------------------------------


class ParallelConfig(Wire, frozen=True, kw_only=True):
    """(D, P, M, B) of the paper: data, pipeline and tensor degree, and sequences a pipeline decodes at once."""

    data: int
    pipeline: int
    tensor: int
    max_batch: int

    @property
    def num_ranks(self) -> int:
        return self.data * self.pipeline * self.tensor


class Shard(Wire, frozen=True, kw_only=True):
    """One position (pipeline, stage, shard) and the rank that takes it."""

    rank: str
    instance: str
    first_group: int
    last_group: int


class Stage(Wire, frozen=True, kw_only=True):
    first_layer: int
    last_layer: int
    shards: list[Shard]


class Pipeline(Wire, frozen=True, kw_only=True):
    """One model replica. An id is never used twice: another shape or another rank makes another pipeline."""

    id: str
    stages: list[Stage]
    max_batch: int
    num_kv_blocks: int
    inherits: list[str] = []
    """Pipelines of earlier epochs whose sequences it is meant to take over (most reusable KV)."""

    def ranks(self) -> list[str]:
        """All ranks, stage by stage, shard by shard; the first one leads."""
        return [shard.rank for stage in self.stages for shard in stage.shards]

    @property
    def leader(self) -> str:
        return self.stages[0].shards[0].rank

    @property
    def tensor(self) -> int:
        return len(self.stages[0].shards)


class Retiring(Wire, frozen=True, kw_only=True):
    """A pipeline of the last epoch that this plan ends."""

    pipeline: Pipeline
    reason: str
    broken: bool = False
    """It lost a rank without notice: there is nothing to arrange, its sequences are recomputed elsewhere."""
    deadline_s: float | None = None
    """The earliest deadline among its instances."""


class Transfer(Wire, frozen=True, kw_only=True):
    """Weight units that a rank pulls, and who holds them, best source first; from disk if all of them fail."""

    units: UnitRange
    sources: list[str]


class RankAddress(Wire, frozen=True, kw_only=True):
    instance: str
    context_address: str
    store_address: str


class Alternative(Wire, frozen=True, kw_only=True):
    """One configuration that the planner weighed."""

    config: ParallelConfig
    latency_s: float
    throughput_per_s: float
    num_ranks: int
    verdict: str
    """Why it was chosen, or why it lost."""
    others: list[ParallelConfig] = []
    """Pipelines of other shapes beside those of `config`."""
    usd_per_h: float = 0.0
    """Of the instances that it occupies; 0: the prices are not known."""
    bytes_moved: int | None = None
    """Weights that a change to it moves; None: not worked out."""
    pause_s: float | None = None
    """How long a pipeline that a change to it stops stands still; None: not worked out."""


class Explanation(Wire, frozen=True, kw_only=True):
    """Why this plan: its cause and inputs, and the alternatives."""

    cause: str
    cause_at_s: float
    decided_at_s: float
    arrivals_per_s: float
    num_ranks: int
    chosen: ParallelConfig | None
    alternatives: list[Alternative]
    bytes_reused: int = 0
    bytes_moved: int = 0
    migration_s: float = 0.0
    notes: list[str] = []
    others: list[ParallelConfig] = []
    """Pipelines of other shapes beside those of `chosen`."""
    prompt_tokens: float = 0.0
    """Typical request that the figures are for."""
    output_tokens: float = 0.0
    objective: str = ""
    expected_calm_s: float = 0.0
    """Expected time to the next event, over which a change had to repay its pause."""
    advisory: bool = False
    """Advice: the plan that it explains was not carried out."""


class Plan(Message, frozen=True, kw_only=True):
    """KV `plan`/`current`, and announced on the core subject `plan`. Whole, not a difference."""

    epoch: int
    model: ModelShape
    pipelines: list[Pipeline]
    retiring: list[Retiring]
    transfers: dict[str, list[Transfer]]
    """By receiving rank."""
    addresses: dict[str, RankAddress]
    """Of every rank that the plan names, as position, as holder or in a retiring pipeline."""
    explanation: Explanation
    next_pipeline_number: int
    deadlines: dict[str, float] = {}
    """When the instances under notice that `pipelines` still use go away; such pipelines have no replacement yet."""
    version: int = SCHEMA_VERSION

    def pipeline_of(self, rank: str) -> Pipeline | None:
        """The pipeline in which `rank` has a position, if any."""
        return next((p for p in self.pipelines if rank in p.ranks()), None)


class DesiredCapacity(Message, frozen=True, kw_only=True):
    """Instances that the planner wants to live, those under notice not counted."""

    spot: int
    on_demand: int
    reason: str
    release: list[str] = []
    """Instances to give back now, first to last."""
    decided_at_s: float = 0.0


class Phase(StrEnum):
    """How far a rank has come with its part of a plan."""

    PREPARED = "prepared"
    """Its weights are in and its process group is formed: it can start as soon as it has stopped."""
    PREPARE_FAILED = "prepare_failed"
    STARTED = "started"
    """It runs its new position."""
    STOPPED = "stopped"
    """Its retiring pipeline has been arranged: the last token is committed."""
    BROKEN = "broken"
    """A collective or a hop of its pipeline failed: somebody in it died."""


class RankProgress(Message, frozen=True, kw_only=True):
    """`plan.<epoch>.progress`."""

    rank: str
    epoch: int
    pipeline: str
    phase: Phase
    at_s: float
    detail: str = ""
    pulled_bytes: int = 0
    pulled_from_disk_bytes: int = 0
    pull_s: float = 0.0
    regroup_s: float = 0.0
    phases_s: dict[str, float] = {}
    """With STARTED: seconds of each phase of the start of an engine that had to be built."""
    names_shape: bool = False
    """With PREPARE_FAILED: this engine cannot take a pipeline of this shape at all, so it is of no use to try again."""


class Arrange(Message, frozen=True, kw_only=True):
    """`plan.arrange`: retiring pipelines stop at a token boundary, as late as their deadline allows."""

    epoch: int
    pipelines: list[str]
    deadline_s: float | None = None
    """None: stop at the next boundary (an acquisition: its instance is already there)."""
    migration_s: float = 0.0
    """What must be kept free before the deadline for the KV to leave."""


class StatusRequest(Message, frozen=True, kw_only=True):
    """`planner.status`, request: answered with `Status`."""


class InstanceStatus(Wire, frozen=True, kw_only=True):
    id: str
    market: Market
    state: InstanceState
    deadline_s: float | None
    ranks: list[str]


class Status(Message, frozen=True, kw_only=True):
    """What the planner knows; `plan` is None until the first instance has joined."""

    epoch: int
    instances: list[InstanceStatus]
    plan: Plan | None
    history: list[Explanation] = []
    """Newest first; with advice that was not carried out."""
    desired: DesiredCapacity | None = None
    """None: nobody has set limits, so the planner takes the fleet as it comes."""
    advisory: bool = False
    """Only forced plans are carried out, see `Explanation.advisory`."""
    num_failed_decisions: int = 0
    """Of this planner process; the last good plan stands."""
    last_failure: str = ""
    """Why the last of them failed; empty once a decision has worked again."""


# --- Subjects --------------------------------------------------------------------------------------------------


class PlannerSubjects:
    """NATS names under one prefix; `model` is a slug (letters, digits, `-`, `_`)."""

    def __init__(self, model: str) -> None:
        self.prefix = f"spotserve.{model}"
        self.plan = f"{self.prefix}.plan"
        self.arrange = f"{self.prefix}.plan.arrange"
        self.status = f"{self.prefix}.planner.status"
        self.all_capacity = f"{self.prefix}.capacity.*"
        self.all_inventory = f"{self.prefix}.inventory.*"
        self.all_load = f"{self.prefix}.load.*"
        self.all_progress = f"{self.prefix}.plan.*.progress"
        self.capacity_stream = f"spotserve-{model}-capacity"
        """JetStream stream over `all_capacity`."""
        self.plan_bucket = f"spotserve-{model}-plan"
        """JetStream KV; keys `current`, with history, and `advice`."""
        self.desired = f"{self.prefix}.fleet.desired"
        self.fleet_bucket = f"spotserve-{model}-fleet"
        """JetStream KV; key `desired` is the `DesiredCapacity` to follow."""
        self.inventory_bucket = f"spotserve-{model}-inventory"
        """JetStream KV with a TTL of 10 s; key = instance."""

    def capacity(self, instance: str) -> str:
        return f"{self.prefix}.capacity.{instance}"

    def inventory(self, instance: str) -> str:
        return f"{self.prefix}.inventory.{instance}"

    def load(self, gateway: str) -> str:
        return f"{self.prefix}.load.{gateway}"

    def progress(self, epoch: int) -> str:
        return f"{self.prefix}.plan.{epoch}.progress"
