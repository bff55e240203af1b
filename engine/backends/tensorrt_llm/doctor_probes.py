"""One probe of `spotserve doctor`, in a process that may be killed: asks a real engine what was only read about it.

python -m engine.backends.tensorrt_llm.doctor_probes NAME MODEL_DIR
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import inspect
import json
import math
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

from engine.backends.findings import Outcome
from engine.backends.tensorrt_llm import gpus
from engine.backends.tensorrt_llm.arguments import llm_arguments
from engine.backends.tensorrt_llm.doctor import LINE
from engine.backends.tensorrt_llm.llm import build
from engine.backends.tensorrt_llm.processes import is_alive
from engine.backends.tensorrt_llm.versions import check_version
from engine.backends.tensorrt_llm.wire import EngineSpec
from engine.errors import EngineUnavailable

PROMPT_TOKENS: Final = 150
NUM_TOKENS: Final = 32
BLOCK_TOKENS: Final = 32
PATIENCE: Final = float(os.environ.get("SPOTSERVE_DOCTOR_PATIENCE", "1"))
"""Factor of all waits; less than 1 for an engine that is known to be fast."""
ANSWER_S: Final = 20.0 * PATIENCE
SILENCE_S: Final = 3.0 * PATIENCE
KNOWN_ORDER: Final = ["self", "inputs", "sampling_params", "lora_request", "prompt_adapter_request", "streaming"]


def say(name: str, is_so: bool | None, seen: object, expected: str = "") -> None:
    """Tell the doctor. None: it is for information."""
    outcome = Outcome.DIFFERS if is_so is False else Outcome.OK
    tell(name, outcome, str(seen), expected)


def tell(name: str, outcome: Outcome, seen: str, expected: str = "") -> None:
    """Tell the doctor; only the first line of what was seen."""
    fields = {"name": name, "outcome": outcome, "seen": seen.partition("\n")[0], "expected": expected}
    sys.stdout.write(LINE + json.dumps(fields) + "\n")
    sys.stdout.flush()


class Watcher:
    """A logits processor that notes how many ids it sees at each call; its copies write to one file."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __call__(
        self, req_id: int, logits: Any, token_ids: list[list[int]], stream_ptr: int | None, client_id: int | None
    ) -> None:
        kind = "null" if stream_ptr is None else "given"
        with Path(self._path).open("a") as file:
            file.write(f"{len(token_ids[0])} {'x'.join(map(str, logits.shape))} {logits.device} stream {kind}\n")


class Forcer:
    """A logits processor that leaves one token."""

    def __init__(self, token: int) -> None:
        self._token = token

    def __call__(
        self, req_id: int, logits: Any, token_ids: list[list[int]], stream_ptr: int | None, client_id: int | None
    ) -> None:
        logits[:] = float("-inf")
        logits[..., self._token] = 0.0


def _build(spec: EngineSpec, *, overlap: bool) -> tuple[Any, dict[str, float]]:
    """As the backend does it; with `overlap` with the scheduler that the backend turns off."""
    if not overlap:
        return build(spec)
    from tensorrt_llm import LLM

    started_s = time.perf_counter()
    llm = LLM(**(llm_arguments(spec) | {"disable_overlap_scheduler": False, "cuda_graph_config": None}))
    return llm, {"total_s": time.perf_counter() - started_s}


class Engine:
    """A running engine and what the probes do with it."""

    def __init__(self, model_dir: Path, *, overlap: bool = False, **changes: Any) -> None:
        config = json.loads((model_dir / "config.json").read_text())
        self.vocab_size: int = config["vocab_size"]
        layers = config["num_hidden_layers"]
        stages = changes.pop("stages", 1)
        fields: dict[str, Any] = {
            "model_dir": str(model_dir),
            "dtype": "auto",
            "tensor": 1,
            "layers": [layers // stages + (i < layers % stages) for i in range(stages)],
            "gpus_per_node": changes.get("tensor", 1) * stages,
            "max_batch": 2,
            "max_model_len": min(1024, config["max_position_embeddings"]),
            "max_num_tokens": 512,
            "block_tokens": BLOCK_TOKENS,
            "num_kv_blocks": 256,
            "vocab_size": self.vocab_size,
        }
        self.llm, self.phases_s = _build(EngineSpec(**(fields | changes)), overlap=overlap)
        ordinary = range(min(1000, self.vocab_size // 2), self.vocab_size - 1)
        self.prompt = [ordinary[(37 * i * i + 11 * i) % len(ordinary)] for i in range(PROMPT_TOKENS)]

    def ask(self, prompt: list[int] | None = None, **given: Any) -> Any:
        from tensorrt_llm import SamplingParams

        arguments = {"max_tokens": NUM_TOKENS, "temperature": 1.0, "top_k": 1, "ignore_eos": True, "detokenize": False}
        params = SamplingParams(**(arguments | given))
        return self.llm.generate_async(inputs=prompt or self.prompt, sampling_params=params, streaming=True)

    async def ids(self, prompt: list[int] | None = None, **given: Any) -> list[int]:
        return list((await self.answer(self.ask(prompt, **given))).outputs[0].token_ids)

    async def answer(self, result: Any) -> Any:
        async with asyncio.timeout(ANSWER_S):
            async for _ in result:
                pass
        return result


async def guarded(name: str, work: Callable[[Engine], Awaitable[None]], engine: Engine) -> None:
    """One question; its failure is a finding, and the others go on."""
    try:
        async with asyncio.timeout(3 * ANSWER_S):
            await work(engine)
    except TimeoutError:
        tell(name, Outcome.FAILED, "no answer in time")
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what was seen
        tell(name, Outcome.FAILED, f"{type(error).__name__}: {error}")


# --- questions about a running engine --------------------------------------------------------------------------


async def in_place(engine: Engine) -> None:
    """Pitfall: one object, changed in place."""
    result = engine.ask()
    objects, lists, lengths = set(), set(), []
    async for output in result:
        objects.add(id(output))
        lists.add(id(output.outputs[0].token_ids))
        lengths.append(len(output.outputs[0].token_ids))
    is_cumulative = lengths == sorted(lengths) and lengths[-1] == NUM_TOKENS
    seen = f"{len(objects)} object, {len(lists)} list, lengths {lengths[0]}..{lengths[-1]} in {len(lengths)} responses"
    say("output.in_place", len(objects) == 1 and is_cumulative, seen, "one object, whose ids are cumulative")


async def resume(engine: Engine) -> None:
    """Whether greedy decoding gives the same again, and after a resume."""
    whole, again = await engine.ids(), await engine.ids()
    say("greedy.repeats", whole == again, f"{_common(whole, again)} of {len(whole)} tokens equal", "all")
    cut = len(whole) // 2
    resumed = whole[:cut] + await engine.ids(engine.prompt + whole[:cut], max_tokens=NUM_TOKENS - cut)
    say("greedy.resumes", whole == resumed, f"{_common(whole, resumed)} of {len(whole)} tokens equal", "all")


def _common(one: list[int], other: list[int]) -> int:
    return next((i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), len(one))


async def stops(engine: Engine) -> None:
    """What becomes of a token that ends the output."""
    whole = await engine.ids()
    token = whole[5]
    outputs = (await engine.answer(engine.ask(stop_token_ids=[token]))).outputs[0]
    kept = bool(outputs.token_ids) and outputs.token_ids[-1] == token
    seen = f"{outputs.finish_reason}, stop_reason {outputs.stop_reason!r}, its token {'kept' if kept else 'taken back'}"
    say("stop.token", (outputs.finish_reason, outputs.stop_reason, kept) == ("stop", token, False), seen, "taken back")
    eos_ids = _eos_ids(engine.llm)
    for position, eos in enumerate(eos_ids):
        forced = (await engine.answer(engine.ask(ignore_eos=False, logits_processor=Forcer(eos)))).outputs[0]
        kept = bool(forced.token_ids) and forced.token_ids[-1] == eos
        seen = (
            f"token {eos}: {forced.finish_reason}, stop_reason {forced.stop_reason!r}, {'kept' if kept else 'removed'}"
        )
        name = "stop.eos" if position == 0 else f"stop.eos.{position}"
        say(name, forced.finish_reason == "stop" and (kept or forced.stop_reason in (eos, None)), seen, "stop")


def _eos_ids(llm: Any) -> list[int]:
    path = Path(str(llm.args.model)) / "generation_config.json"
    eos = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
    return eos if isinstance(eos, list) else [eos] if eos is not None else []


async def processors(engine: Engine) -> None:
    """What a logits processor is called with."""
    await _watch_processor(engine, "processor.sees_all_ids", lag=0)


async def lagging_processors(engine: Engine) -> None:
    """The same with the overlap scheduler."""
    await _watch_processor(engine, "processor.overlap_lag", lag=1)


async def _watch_processor(engine: Engine, name: str, lag: int) -> None:
    with tempfile.NamedTemporaryFile("r") as file:
        await engine.ids(max_tokens=6, logits_processor=Watcher(file.name))
        lines = file.read().splitlines()
    lengths = [int(line.split()[0]) - len(engine.prompt) for line in lines]
    kind = lines[0].partition(" ")[2] if lines else "never called"
    say(name, lengths == [0, *(i - lag for i in range(1, 6))], f"{lengths}; {kind}", f"ids that lag by {lag}")


async def seeds(engine: Engine) -> None:
    """Whether a seed repeats."""
    given: dict[str, Any] = {"top_k": 50, "seed": 7}
    one, two = await engine.ids(**given), await engine.ids(**given)
    other = await engine.ids(**(given | {"seed": 8}))
    seen = f"the same seed {'repeats' if one == two else 'differs'}, another {'repeats' if one == other else 'differs'}"
    say("seed.repeats", None, f"{seen} (the backend draws by itself where a client gave a seed)")


async def logprobs(engine: Engine) -> None:
    """How many tokens an entry has, and what 0 means."""
    for number in (0, 1, 3):
        output = (await engine.answer(engine.ask(max_tokens=4, logprobs=number))).outputs[0]
        sizes = [len(entry) for entry in output.logprobs or []]
        if number == 0:
            say("logprobs.0", not sizes, f"{len(sizes)} entries", "off")
        else:
            good = len(sizes) == 4 and all(number <= size <= number + 1 for size in sizes)
            say(f"logprobs.{number}", good, f"entries of {sizes} tokens", "one entry a token")


async def aborts(engine: Engine) -> None:
    """Whether an abort is answered, of a request that runs and of one that waits."""
    running = [engine.ask(max_tokens=1500) for _ in range(2)]
    await asyncio.gather(*(anext(result) for result in running))
    waiting = engine.ask(max_tokens=8)
    waiting.abort()
    try:
        async with asyncio.timeout(SILENCE_S):
            await engine.answer(waiting)
        seen = f"answered: {waiting.outputs[0].finish_reason}"
    except TimeoutError:
        seen = f"no answer in {SILENCE_S:.1f} s"
    say("abort.waiting", None, f"{seen} (the backend waits for neither)")
    for result in running:
        result.abort()
    try:
        ended = await asyncio.gather(*map(engine.answer, running))
        reasons = {result.outputs[0].finish_reason for result in ended}
        say("abort.running", reasons == {"cancelled"}, f"answered: {sorted(map(str, reasons))}", "cancelled")
    except TimeoutError:
        say("abort.running", is_so=False, seen=f"no answer in {ANSWER_S:.0f} s", expected="cancelled")


async def reuse(engine: Engine) -> None:
    """Whether prefixes are found again, also those of aborted requests."""
    prompt = [token + 1 for token in reversed(engine.prompt)]
    await engine.ids(prompt, max_tokens=2)
    again = await engine.answer(engine.ask(prompt, max_tokens=2))
    cached = int(again.cached_tokens)
    say(
        "reuse.prompt",
        cached >= (PROMPT_TOKENS // BLOCK_TOKENS - 1) * BLOCK_TOKENS,
        f"{cached} of {len(prompt)} tokens",
        "its full blocks",
    )
    fresh = [token - 1 for token in prompt]
    cancelled = engine.ask(fresh, max_tokens=1500)
    while len((await anext(cancelled)).outputs[0].token_ids) < 64:
        pass
    cancelled.abort()
    with contextlib.suppress(TimeoutError):
        await engine.answer(cancelled)
    ids = list(cancelled.outputs[0].token_ids)[:64]
    after = await engine.answer(engine.ask(fresh + ids, max_tokens=2))
    seen = f"{int(after.cached_tokens)} of {len(fresh) + len(ids)} tokens cached after an abort"
    say("reuse.cancelled", None, f"{seen} (prompt {len(fresh)})")


async def lengths(engine: Engine) -> None:
    """The limits, and that the engine serves on after a request that broke them."""
    limit = int(engine.llm.args.max_seq_len)
    result = await engine.answer(engine.ask(max_tokens=limit * 2, top_k=1))
    total = len(engine.prompt) + len(result.outputs[0].token_ids)
    say(
        "max_tokens.clamped", total <= limit, f"{total} tokens in all, {result.outputs[0].finish_reason}", f"<= {limit}"
    )
    from tensorrt_llm.llmapi import RequestError

    try:
        await engine.ids(engine.prompt * (limit // len(engine.prompt) + 1))
        say("prompt.too_long", is_so=False, seen="was taken", expected="RequestError")
    except (RequestError, ValueError) as error:
        say("prompt.too_long", isinstance(error, RequestError), type(error).__name__, "RequestError")
    say("after_errors.serves", len(await engine.ids(max_tokens=3)) == 3, "serves on", "serves on")


async def killed_worker(engine: Engine) -> None:
    """The last question: its answer is a dead engine."""
    pids = sorted(pid for pid in _worker_pids() if is_alive(pid) and pid != os.getpid())
    seen = f"{len(pids)} processes, groups {sorted({os.getpgid(pid) for pid in pids} - {os.getpgid(0)})} beside ours"
    say("workers.listed", bool(pids), seen, "NVML or /proc names the worker processes")
    if not pids:
        return
    result = engine.ask(max_tokens=1500)
    await anext(result)
    os.kill(pids[-1], signal.SIGKILL)
    try:
        async with asyncio.timeout(SILENCE_S + ANSWER_S / 2):
            await engine.answer(result)
        seen = f"it ended: {result.outputs[0].finish_reason}"
    except TimeoutError:
        seen = "silence"
    except Exception as error:  # noqa: BLE001 - that is the question
        seen = f"{type(error).__name__}: {error}"
    say("dead_worker.stream", None, seen)
    with contextlib.suppress(Exception):
        say("dead_worker.health", None, f"_check_health() is {engine.llm._check_health()}")  # noqa: SLF001 - no other
    done = threading.Event()

    def shut_down() -> None:
        with contextlib.suppress(Exception):
            engine.llm.shutdown()
        done.set()

    threading.Thread(target=shut_down, daemon=True).start()
    has_ended = await asyncio.to_thread(done.wait, SILENCE_S + ANSWER_S / 2)
    say("dead_worker.shutdown", None, "returns" if has_ended else "hangs (the backend kills it)")


def _worker_pids() -> set[int]:
    """By NVML; where that tells no pids of this container, our descendants."""
    states = gpus.states(gpus.names(range(gpus.count() or 0), os.environ)) or []
    listed = {pid for state in states for pid in state.pids if is_alive(pid)}
    return listed or _descendants(os.getpid())


def _descendants(root: int) -> set[int]:
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {root}


BASICS: Final = (
    ("output.in_place", in_place),
    ("greedy", resume),
    ("stop", stops),
    ("processor.sees_all_ids", processors),
    ("seed.repeats", seeds),
    ("logprobs", logprobs),
    ("abort", aborts),
    ("reuse", reuse),
    ("lengths", lengths),
    ("dead_worker", killed_worker),
)


# --- probes ----------------------------------------------------------------------------------------------------


def start(name: str, model_dir: Path, **changes: Any) -> Engine:
    """Build it and tell how long that took. Raises whatever the package does, after telling it."""
    started_s = time.perf_counter()
    try:
        import tensorrt_llm

        check_version(tensorrt_llm.__version__)
        import_s = time.perf_counter() - started_s
        engine = Engine(model_dir, **changes)
    except Exception as error:
        causes = [error, *([error.__cause__] if error.__cause__ else [])]
        tell(f"{name}.start", Outcome.FAILED, ", from ".join(f"{type(e).__name__}: {e}" for e in causes))
        raise
    phases = " ".join(f"{key}={value:.1f}" for key, value in engine.phases_s.items())
    say(f"{name}.start", None, f"import_s={import_s:.1f} {phases}")
    return engine


async def basics(model_dir: Path) -> None:
    """All questions that one engine of one GPU can answer."""
    engine = start("basics", model_dir)
    import tensorrt_llm

    say("package.version", None, tensorrt_llm.__version__)
    order = list(inspect.signature(tensorrt_llm.LLM.generate_async).parameters)
    say("generate_async.order", order[: len(KNOWN_ORDER)] == KNOWN_ORDER, " ".join(order), " ".join(KNOWN_ORDER))
    detector = "tensorrt_llm._torch.pyexecutor.hang_detector"
    say("package.hang_detector", None, "there" if importlib.util.find_spec(detector) else "not there (#10480)")
    for name, question in BASICS:
        await guarded(name, question, engine)


async def restart(model_dir: Path) -> None:
    """With the overlap scheduler on, as nobody tells it; then an orderly end with a request under way."""
    engine = start("restart", model_dir, overlap=True, cuda_graphs=False, autotuner=False)
    await guarded("processor.overlap_lag", lagging_processors, engine)
    pending = engine.ask(max_tokens=1500)
    await anext(pending)
    started_s = time.perf_counter()
    try:
        async with asyncio.timeout(ANSWER_S):
            await asyncio.to_thread(engine.llm.shutdown)
        say("shutdown.ends", None, f"after {time.perf_counter() - started_s:.1f} s, with a request under way")
    except TimeoutError:
        say("shutdown.ends", is_so=False, seen=f"not in {ANSWER_S:.0f} s", expected="it ends")
        return
    try:
        async with asyncio.timeout(SILENCE_S):
            async for _ in pending:
                pass
        seen = f"it ended: {pending.outputs[0].finish_reason}"
    except TimeoutError:
        seen = "it waits for ever"
    except Exception as error:  # noqa: BLE001 - that is the question
        seen = f"{type(error).__name__}: {error}"
    say("shutdown.pending", None, f"{seen} (the backend forgets it)")


async def connector(model_dir: Path) -> None:
    """The layout of the KV cache, as a connector is told."""
    with tempfile.TemporaryDirectory() as folder:
        engine = start(
            "connector", model_dir, kv_dir=folder, kv_limit_bytes=1 << 30, cuda_graphs=False, autotuner=False
        )
        await guarded("connector.serves", _connector_serves, engine)
        await guarded("connector.layout", lambda one: asyncio.to_thread(_connector_layout, one, Path(folder)), engine)


async def _connector_serves(engine: Engine) -> None:
    ids = await engine.ids()
    say("connector.serves", len(ids) == NUM_TOKENS, f"{len(ids)} tokens", f"{NUM_TOKENS} tokens")


def _connector_layout(engine: Engine, folder: Path) -> None:
    """Whether a block is one contiguous piece, of the layers, keys and values, heads, tokens and head size."""
    config = json.loads((Path(str(engine.llm.args.model)) / "config.json").read_text())
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    num_elements = config["num_hidden_layers"] * 2 * heads * BLOCK_TOKENS * size
    notes = sorted(folder.glob("layout-*"))
    if not notes:
        say("connector.layout", is_so=False, seen="no KV cache was registered", expected="one tensor a rank")
    for note in notes:
        facts = note.read_text()
        shape, strides = (json.loads(f"[{part.partition(']')[0]}]") for part in facts.split("[")[1:3])
        expected = f"a contiguous tensor (blocks, ...) with {num_elements} elements in a block"
        is_so = math.prod(shape[1:]) == num_elements and strides[0] == num_elements
        say("connector.layout", is_so, f"{facts}; heads {heads}, block {BLOCK_TOKENS}, head size {size}", expected)


async def shaped(name: str, model_dir: Path, **changes: Any) -> None:
    """An engine of another shape."""
    engine = start(name, model_dir, **changes)
    await guarded(name, lambda one: _same_tokens(name, one), engine)


async def _same_tokens(name: str, engine: Engine) -> None:
    whole = await engine.ids()
    cut = len(whole) // 2
    resumed = whole[:cut] + await engine.ids(engine.prompt + whole[:cut], max_tokens=NUM_TOKENS - cut)
    say(f"{name}.resumes", whole == resumed, f"{_common(whole, resumed)} of {len(whole)} tokens equal", "all")


PROBES: Final[dict[str, Callable[[Path], Awaitable[None]]]] = {
    "basics": basics,
    "restart": restart,
    "connector": connector,
    "tensor": lambda model_dir: shaped("tensor", model_dir, tensor=2),
    "pipeline": lambda model_dir: shaped("pipeline", model_dir, stages=2),
}


def main() -> None:
    """Ends at once when it is through: TensorRT-LLM's exit handlers may hang."""
    name, model_dir = sys.argv[1], Path(sys.argv[2])

    async def run() -> None:
        await PROBES[name](model_dir)

    code = 0
    try:
        asyncio.run(run())
    except EngineUnavailable:
        code = 1
    except Exception as error:  # noqa: BLE001 - one line, no traceback
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
