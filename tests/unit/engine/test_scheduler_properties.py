"""The scheduler under random events, with a model whose KV lies in real pools.

The oracle is token equality: whatever is cancelled, evicted, pulled, shared, broken, parked and resumed, each is the
stream of an undisturbed run. The model reads the KV of every position it attends to and writes as late as it may, so
a block that is shared by accident, freed too early or not covered by the table changes the tokens.
"""

import zlib
from dataclasses import dataclass, field

import msgspec
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.core.scheduler import CostEstimate, PullOrder, Scheduler, SchedulerLimits, SequenceKey, Step
from engine.core.sequence import State
from engine.protocol import (
    FinishReason,
    GenerateRequest,
    KvHolder,
    KvSource,
    RejectReason,
    SamplingParams,
    TokenEntry,
)

VOCAB_SIZE = 16
EOS, STOP = 0, 1
MAX_MODEL_LEN = 20
MAX_PROMPT = 10
NEVER_PULL = CostEstimate(1e-9, 1.0, 1.0, 1)
ALWAYS_PULL = CostEstimate(1.0, 1e9, 0.0, 1)


def next_token(history: list[object], sampling: SamplingParams, index: int) -> int:
    return zlib.crc32(repr((history, sampling.seed, index)).encode()) % VOCAB_SIZE


def undisturbed(prompt: list[int], sampling: SamplingParams) -> tuple[list[int], FinishReason]:
    ids: list[int] = []
    while True:
        ids.append(next_token([*prompt, *ids], sampling, len(ids)))
        is_eos = ids[-1] == EOS and not sampling.ignore_eos
        if (is_eos or ids[-1] in sampling.stop_token_ids) and len(ids) >= sampling.min_tokens:
            return ids, FinishReason.STOP
        if len(ids) == sampling.max_tokens or len(prompt) + len(ids) == MAX_MODEL_LEN:
            return ids, FinishReason.LENGTH


@dataclass
class Client:
    """What the gateway knows of one stream."""

    key: SequenceKey
    prompt: list[int]
    sampling: SamplingParams
    deadline_s: float | None
    ids: list[int] = field(default_factory=list)
    attempt: int = 0
    engine: "Engine | None" = None
    source: KvSource | None = None
    num_resumed_with: int | None = None
    finish: FinishReason | None = None

    def request(self, num_known: int) -> GenerateRequest:
        return GenerateRequest(
            request_id=self.key.request_id,
            choice=self.key.choice,
            attempt=self.attempt,
            gateway="g",
            prompt_ids=self.prompt,
            committed_ids=self.ids[:num_known],
            sampling=self.sampling,
            kv_source=self.source,
            deadline_s=self.deadline_s,
        )


class Engine:
    """A pipeline: the scheduler, a pool of KV, and the steps and pulls in flight."""

    def __init__(self, number: int, limits: SchedulerLimits, cost: CostEstimate) -> None:
        self.number = number
        self.limits = limits
        self.scheduler = Scheduler(limits, cost, f"p{number}")
        self.pool: list[object] = ["never written"] * (limits.num_blocks * limits.block_tokens)
        self.steps: list[Step] = []
        self.pulls: list[PullOrder] = []

    def slot(self, blocks: list[int], position: int) -> int:
        return blocks[position // self.limits.block_tokens] * self.limits.block_tokens + (
            position % self.limits.block_tokens
        )

    def run(self, step: Step) -> list[int]:
        sampled = []
        for s in step.slices:
            for row, token_id in enumerate(s.token_ids):
                self.pool[self.slot(s.blocks, s.context_tokens + row)] = token_id
        for s in step.slices:
            if s.samples:
                num_tokens = s.context_tokens + len(s.token_ids)
                history = [self.pool[self.slot(s.blocks, p)] for p in range(num_tokens)]
                sampled.append(next_token(history, s.sampling, s.index))
        return sampled


class World(RuleBasedStateMachine):
    @initialize(data=st.data())
    def start(self, data):
        self.now_s = 1000.0
        self.clients: dict[SequenceKey, Client] = {}
        self.engines: list[Engine] = []
        self.num_engines = 0
        self.start_engine(data)

    @property
    def engine(self) -> Engine:
        return self.engines[-1]

    def start_engine(self, data):
        block_tokens = data.draw(st.integers(1, 5), label="block_tokens")
        num_min = -(-(MAX_MODEL_LEN - 1) // block_tokens)
        limits = SchedulerLimits(
            num_blocks=data.draw(st.integers(num_min, num_min * 3 // 2), label="num_blocks"),
            block_tokens=block_tokens,
            max_batch=data.draw(st.integers(1, 6), label="max_batch"),
            max_model_len=MAX_MODEL_LEN,
            max_step_tokens=data.draw(st.integers(1, 16), label="max_step_tokens"),
            num_micro_batches=data.draw(st.integers(1, 4), label="num_micro_batches"),
            vocab_size=VOCAB_SIZE,
            prefix_caching=data.draw(st.booleans(), label="prefix_caching"),
        )
        cost = data.draw(st.sampled_from([ALWAYS_PULL, ALWAYS_PULL, NEVER_PULL]), label="cost")
        self.num_engines += 1
        self.engines.append(Engine(self.num_engines, limits, cost))

    # --- The gateway ---

    def send(self, client: Client, num_known: int | None = None) -> bool:
        num_known = len(client.ids) if num_known is None else num_known
        request = client.request(num_known)
        reply = self.engine.scheduler.submit(request, self.now_s)
        if reply.accepted:
            del client.ids[num_known:]
            client.engine = self.engine
            resumes = bool(request.committed_ids) or request.kv_source is not None
            client.num_resumed_with = len(client.ids) if resumes else None
        else:
            assert reply.reason is RejectReason.FULL, reply
        return reply.accepted

    def fold(self, entries: list) -> None:
        for out in entries:
            assert out.gateway == "g"
            entry: TokenEntry = out.entry
            client = self.clients[SequenceKey(entry.request_id, entry.choice)]
            assert client.finish is None
            assert entry.attempt == client.attempt
            assert entry.index == len(client.ids)
            client.ids += entry.ids
            if entry.ids:
                self.check_resume(client, entry)
                client.num_resumed_with = client.source = None
                self.release(client, self.engines[:-1])
            if entry.finish is not None:
                client.finish = entry.finish
                assert (entry.error == "deadline") == (entry.finish is FinishReason.ERROR)
                self.release(client, self.engines)
            if entry.interruption is not None:
                client.source = entry.interruption.kv_source
                client.engine = None
                client.attempt += 1

    def check_resume(self, client: Client, entry: TokenEntry) -> None:
        if client.num_resumed_with is None:
            assert entry.resume is None
            return
        assert entry.resume is not None
        num_known = len(client.prompt) + client.num_resumed_with - 1
        num_before = num_known if client.source is None else min(num_known, client.source.num_tokens)
        num_told = entry.resume.pulled_tokens + entry.resume.recomputed_tokens
        assert num_told <= num_before
        assert num_told == num_before or self.engine.limits.prefix_caching
        assert entry.resume.waited_s >= 0

    def release(self, client: Client, engines: list[Engine]) -> None:
        for engine in engines:
            engine.scheduler.release(*client.key)

    # --- Events ---

    @precondition(lambda self: len(self.clients) < 20)
    @rule(
        prompt=st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=MAX_PROMPT),
        choice=st.integers(0, 1),
        max_tokens=st.integers(1, 16),
        min_tokens=st.integers(0, 4),
        ignore_eos=st.booleans(),
        lifetime_s=st.none() | st.none() | st.integers(5, 60),
        num_requests=st.integers(1, 4),
    )
    def submit(self, num_requests, choice, **fields):
        """A burst of like requests with different seeds; `choice` 1: two choices each."""
        for _ in range(num_requests):
            number = len(self.clients)
            for c in range(choice + 1):
                self.submit_one(SequenceKey(f"r{number}", c), c, **fields)

    def submit_one(self, key, choice, prompt, max_tokens, min_tokens, ignore_eos, lifetime_s):
        sampling = SamplingParams(
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            ignore_eos=ignore_eos,
            eos_token_ids=[EOS],
            stop_token_ids=[STOP] if choice else [],
            seed=len(self.clients),
        )
        deadline_s = None if lifetime_s is None else self.now_s + lifetime_s
        self.clients[key] = Client(key, prompt, sampling, deadline_s)
        self.send(self.clients[key])

    @rule()
    def tick(self):
        self.now_s += 1.0
        orders, entries = self.engine.scheduler.tick(self.now_s)
        self.engine.pulls += orders
        self.fold(entries)

    @rule()
    def schedule(self):
        step = self.engine.scheduler.schedule(self.now_s)
        if step is not None:
            rows = [len(s.token_ids) for s in step.slices]
            assert 0 < sum(rows) <= self.engine.limits.max_step_tokens
            assert min(rows) > 0
            self.engine.steps.append(step)

    @precondition(lambda self: self.engine.steps)
    @rule(data=st.data())
    def commit(self, data):
        # Steps may overtake each other only in a broken runtime; the scheduler minds only within a prompt.
        step = data.draw(st.sampled_from(self.engine.steps))
        while (earlier := self.shares_with_earlier(step)) is not None:
            step = earlier
        self.commit_step(step)

    def shares_with_earlier(self, step: Step) -> Step | None:
        keys = {s.key for s in step.slices}
        earlier = self.engine.steps[: self.engine.steps.index(step)]
        return next((s for s in earlier if keys & {other.key for other in s.slices}), None)

    def commit_step(self, step: Step) -> None:
        self.engine.steps.remove(step)
        sampled = self.engine.run(step)
        self.fold(self.engine.scheduler.commit(step.step_id, sampled, self.now_s))

    @rule(num_rounds=st.integers(1, 8))
    def run(self, num_rounds):
        """Nothing special happens for a while."""
        for _ in range(num_rounds):
            self.round()

    def round(self) -> None:
        """Let pulls end, give each stage its step, and end the oldest step."""
        self.tick()
        for engine in self.engines:
            for order in list(engine.pulls):
                self.end_pull(engine, order, ok=True)
        num_steps = -1
        while num_steps < len(self.engine.steps):
            num_steps = len(self.engine.steps)
            self.schedule()
        if self.engine.steps:
            self.commit_step(self.engine.steps[0])
        self.consistent()

    @precondition(lambda self: any(engine.pulls for engine in self.engines))
    @rule(data=st.data(), ok=st.booleans() | st.just(True))
    def finish_pull(self, data, ok):
        engine = data.draw(st.sampled_from([e for e in self.engines if e.pulls]))
        self.end_pull(engine, data.draw(st.sampled_from(engine.pulls)), ok)

    def end_pull(self, engine: Engine, order: PullOrder, ok: bool) -> None:
        engine.pulls.remove(order)
        holder = next((e for e in self.engines if str(e.number) == order.source.holders[0].rank), None)
        held = holder.scheduler._sequences.get(order.key) if holder is not None else None
        ok = ok and held is not None and held.state is State.PARKED
        if ok and holder is not None and held is not None:
            assert held.num_computed >= order.source.num_tokens
            assert held.blocks[: len(order.source.blocks)] == order.source.blocks
            for p in range(order.source.num_tokens):
                engine.pool[engine.slot(order.blocks, p)] = holder.pool[holder.slot(order.source.blocks, p)]
        engine.scheduler.pull_done(order.key, ok, 0.5, self.now_s)

    @precondition(lambda self: self.clients)
    @rule(data=st.data())
    def cancel(self, data):
        request_id = data.draw(st.sampled_from(sorted(self.clients))).request_id
        for client in self.clients.values():
            if client.key.request_id == request_id and client.engine is None:
                client.finish = client.finish or FinishReason.CANCELLED
        for engine in self.engines:
            self.fold(engine.scheduler.cancel(request_id, self.now_s))

    @precondition(lambda self: self.clients)
    @rule(data=st.data(), retry=st.booleans())
    def submit_again(self, data, retry):
        """The gateway lost a reply, or gave an attempt up; it may know fewer tokens than the engine."""
        client = self.clients[data.draw(st.sampled_from(sorted(self.clients)))]
        if client.finish is None and client.engine is self.engine and retry:
            client.attempt += 1
            if self.send(client, data.draw(st.integers(0, len(client.ids)))):
                stale = msgspec.structs.replace(client.request(0), attempt=client.attempt - 1)
                reply = self.engine.scheduler.submit(stale, self.now_s)
                assert reply.reason is RejectReason.INVALID
            else:
                client.attempt -= 1
        elif client.engine is self.engine:
            before = self.engine.scheduler.counts()
            assert self.engine.scheduler.submit(client.request(len(client.ids)), self.now_s).accepted
            assert self.engine.scheduler.counts() == before

    @precondition(lambda self: self.clients)
    @rule(data=st.data())
    def resend(self, data):
        client = self.clients[data.draw(st.sampled_from(sorted(self.clients)))]
        if client.engine is self.engine:
            index = data.draw(st.integers(0, len(client.ids)))
            entry = self.engine.scheduler.resend(*client.key, index)
            assert entry is not None
            assert (entry.index, entry.ids, entry.attempt) == (index, client.ids[index:], client.attempt)
            assert entry.finish is client.finish

    @precondition(lambda self: self.num_engines < 6 and self.engine.scheduler.counts().running)
    @rule(data=st.data(), broken=st.booleans(), lost=st.sampled_from([False, False, False, True]))
    def interrupt(self, data, broken, lost):
        """The pipeline stops, with its KV or without, or breaks in the middle of its steps."""
        engine = self.engine
        if broken:
            self.break_down(engine)
            self.start_engine(data)
            self.send_homeless()
            return
        while engine.steps:
            self.commit_step(engine.steps[0])
        holder = KvHolder(
            rank=str(engine.number), context_address="", first_layer=0, last_layer=0, first_group=0, last_group=0
        )
        engine.scheduler.drain()
        self.fold(engine.scheduler.park("preempted", [] if lost else [holder], self.now_s + 30))
        assert engine.scheduler.counts().free_slots == 0
        self.start_engine(data)
        self.send_homeless()

    def break_down(self, engine: Engine) -> None:
        """Nothing is heard of it any more, and nothing of it can be pulled."""
        self.engines.remove(engine)
        for client in self.clients.values():
            if client.engine is engine and client.finish is None:
                client.engine = client.source = None
                client.attempt += 1

    @rule()
    def send_homeless(self):
        for client in self.clients.values():
            if client.engine is None and client.finish is None:
                self.send(client)

    # --- What must hold ---

    @invariant()
    def consistent(self):
        for engine in getattr(self, "engines", []):
            engine.scheduler.check_invariants()
            counts = engine.scheduler.counts()
            assert counts.steps_in_flight == len(engine.steps) <= engine.limits.num_micro_batches
            assert counts.running <= engine.limits.max_batch

    @invariant()
    def tokens_are_those_of_an_undisturbed_run(self):
        for client in getattr(self, "clients", {}).values():
            ids, finish = undisturbed(client.prompt, client.sampling)
            assert client.ids == ids[: len(client.ids)]
            if client.finish in (FinishReason.STOP, FinishReason.LENGTH):
                assert (client.ids, client.finish) == (ids, finish)

    def teardown(self):
        if not hasattr(self, "engines"):
            return
        for _ in range(3000):
            if all(client.finish is not None for client in self.clients.values()):
                break
            self.send_homeless()
            self.round()
        assert [c for c in self.clients.values() if c.finish is None] == [], "hangs"
        self.tokens_are_those_of_an_undisturbed_run()
        for engine in self.engines:
            for order in list(engine.pulls):
                self.end_pull(engine, order, ok=False)
            for step in list(engine.steps):
                self.commit_step(step)
            counts = engine.scheduler.counts()
            assert (counts.running, counts.waiting, counts.parked) == (0, 0, 0)
            assert counts.free_kv_blocks == counts.total_kv_blocks
            engine.scheduler.check_invariants()


TestWorld = World.TestCase
TestWorld.settings = settings(
    max_examples=150,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
