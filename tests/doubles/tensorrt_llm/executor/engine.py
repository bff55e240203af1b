"""The executor loop: requests wait, are admitted, decode side by side, end. One thread an engine."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import itertools
import pickle
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from trtllm_double.control import Switches, control

from tensorrt_llm.llmapi.llm_args import TorchLlmArgs
from tensorrt_llm.sampling_params import SamplingParams

from .connector import KvConnector
from .model import Context, ModelConfig, choose, draw_key, log_softmax
from .result import Logprob, RequestOutput, Response, ResponseQueue
from .workers import JobWorkers, Workers

_IDLE_S = 0.02


@dataclass
class _Sequence:
    """One choice of a request."""

    index: int
    context: Context
    processors: list[Any]
    new_ids: list[int] = field(default_factory=list)
    pending_ids: list[int] = field(default_factory=list)
    pending_logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    num_steps: int = 0
    is_done: bool = False


@dataclass
class _Request:
    output: RequestOutput
    params: SamplingParams
    prompt_ids: list[int]
    max_tokens: int
    seed: int
    salt: str
    sequences: list[_Sequence]
    num_blocks: int
    prefill_left: int = 0
    cached_tokens: int = 0
    prompt_logprobs: list[dict[int, Logprob]] | None = None


class _Failed(Exception):
    """A forward pass raised."""


class _ConnectorFailed(Exception):
    """A connector raised, outside of the forward pass."""


class Engine:
    def __init__(
        self, args: TorchLlmArgs, config: ModelConfig, workers: Workers | JobWorkers, weights: bytes, start: int
    ) -> None:
        self._args = args
        self._config = config
        self._workers = workers
        self._weights = weights
        self._is_faulty = control.switches().fault_starts is None or start in (control.switches().fault_starts or [])
        kv = args.kv_cache_config
        tokens = int(control.switches().gpu_memory_bytes * (kv.free_gpu_memory_fraction or 0.9) * args.world_size)
        tokens //= config.kv_bytes_per_token
        self.tokens_per_block = kv.tokens_per_block
        self.num_blocks = min(tokens, kv.max_tokens or tokens) // kv.tokens_per_block
        self.max_seq_len = min(args.max_seq_len or config.max_len, self.num_blocks * kv.tokens_per_block)
        self._cached: OrderedDict[bytes, None] = OrderedDict()
        self._connector: KvConnector | None = None
        if args.kv_connector_config is not None:
            self._connector = KvConnector(args, config, self.num_blocks, weights)
        self._touched: list[ResponseQueue] = []
        self._commands: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._waiting: list[_Request] = []
        self._active: list[_Request] = []
        self._late_aborts: list[tuple[float, int]] = []
        self._num_steps = 0
        self._num_forward_errors = 0
        self._ids = itertools.count(2)
        self._stop = threading.Event()
        self.is_shutdown = False
        self.has_served = False
        self.error: BaseException | None = None
        self.stats: list[dict[str, Any]] = []
        self._thread = threading.Thread(target=self._run, name="executor", daemon=True)
        self._thread.start()

    # --- called from the caller's thread ----------------------------------------------------------------------

    def next_id(self) -> int:
        return next(self._ids)

    def submit(self, output: RequestOutput, params: SamplingParams, prompt_ids: list[int], salt: str) -> None:
        self.has_served = True
        limit = self.max_seq_len - len(prompt_ids)
        max_tokens = limit if params.max_tokens is None else min(params.max_tokens, limit)
        given = params.logits_processor
        processors = [] if given is None else list(given) if isinstance(given, list) else [given]
        for processor in processors:
            assert 4 <= len(inspect.signature(processor).parameters) <= 5, "not a LogitsProcessor"
        assert params.best_of is not None
        sequences = [
            # They live in the workers: what comes there was pickled.
            _Sequence(i, Context(self._weights, prompt_ids), [pickle.loads(pickle.dumps(p)) for p in processors])
            for i in range(params.best_of)
        ]
        num_blocks = -(-(len(prompt_ids) + max(max_tokens, 0)) // self.tokens_per_block) * params.best_of
        seed = params.seed if params.seed is not None else int.from_bytes(np.random.bytes(4), "little")
        if not control.switches().seed_reproducible:
            seed ^= int.from_bytes(np.random.bytes(4), "little")
        self._commands.put(
            ("add", _Request(output, params, list(prompt_ids), max_tokens, seed, salt, sequences, num_blocks))
        )

    def abort(self, request_id: int) -> None:
        control.log("abort", request_id=request_id)
        self._commands.put(("abort", request_id))

    def shutdown(self) -> None:
        """Waits without limit for the workers' futures, as the real one: for ever where one is dead."""
        if self.is_shutdown:
            return
        self.is_shutdown = True
        control.log("shutdown")
        if control.switches().shutdown_hangs or not self._workers.all_alive():
            threading.Event().wait()
        self._stop.set()
        self._thread.join()
        self._workers.stop()
        control.log("shut_down")

    # --- the executor's thread --------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stop.is_set():
            self._take_commands()
            self._notify()
            if not self._active and not self._waiting:
                continue
            switches = control.switches()
            if not self._workers.can_step() or self._due(switches.silent_after):
                time.sleep(_IDLE_S)  # Nobody says a word.
                continue
            if self._due(switches.engine_error_after):
                self._break(RuntimeError("CUDA error: an illegal memory access was encountered"))
                self._notify()
                return
            time.sleep(switches.step_s)
            try:
                self._admit()
                self._check_forward(switches)
                self._step(switches)
            except _ConnectorFailed as error:
                self._break(RuntimeError(f"{error.__cause__}"))
                self._notify()
                return
            except Exception as error:  # noqa: BLE001 - whatever it is, each active request hears of it
                self._fail_all(f"{error}")
            self._notify()
            self._num_steps += 1

    def _check_forward(self, switches: Switches) -> None:
        most = switches.num_forward_errors
        is_due = self._due(switches.forward_error_after) and (most is None or self._num_forward_errors < most)
        if is_due or switches.poison_token in [request.prompt_ids[0] for request in self._active]:
            self._num_forward_errors += 1
            raise _Failed("CUDA error in the forward pass")

    def _put(self, request: _Request, response: Response | BaseException) -> None:
        request.output.queue.put(response)
        self._touched.append(request.output.queue)

    def _notify(self) -> None:
        touched, self._touched = self._touched, []
        ResponseQueue.notify(touched)

    def _due(self, after: int | None) -> bool:
        return self._is_faulty and after is not None and self._num_steps >= after

    def _take_commands(self) -> None:
        is_idle = not self._active and not self._waiting
        while True:
            try:
                kind, value = self._commands.get(timeout=_IDLE_S) if is_idle else self._commands.get_nowait()
            except queue.Empty:
                break
            is_idle = False
            if kind == "add":
                self._waiting.append(value)
            else:
                self._late_aborts.append((time.monotonic() + control.switches().abort_delay_s, value))
        due = [request_id for at_s, request_id in self._late_aborts if at_s <= time.monotonic()]
        self._late_aborts = [entry for entry in self._late_aborts if entry[1] not in due]
        if due and self._workers.can_step() and not self._due(control.switches().silent_after):
            for request_id in due:
                self._cancel(request_id)

    def _cancel(self, request_id: int) -> None:
        drops = control.switches().drop_aborts
        for held, is_silent in ((self._waiting, drops != "none"), (self._active, drops == "all")):
            for request in held:
                if request.output.request_id != request_id:
                    continue
                held.remove(request)
                self._release(request)
                if not is_silent:
                    for sequence in request.sequences:
                        if not sequence.is_done:
                            self._answer(request, sequence, "cancelled", is_final=True)
                return

    def _break(self, error: BaseException) -> None:
        self.error = error
        for request in [*self._active, *self._waiting]:
            self._put(request, error)
        self._active, self._waiting = [], []

    def _fail_all(self, message: str) -> None:
        for request in self._active:
            self._put(request, Response(error=message))
            self._release(request)
        self._active = []

    def _admit(self) -> None:
        used = sum(request.num_blocks for request in self._active)
        num_sequences = sum(len(request.sequences) for request in self._active)
        while self._waiting:
            request = self._waiting[0]
            problem = self._problem(request)
            if problem is None and (
                used + request.num_blocks > self.num_blocks
                or num_sequences + len(request.sequences) > (self._args.max_batch_size or 1)
            ):
                return
            del self._waiting[0]
            if problem is not None:
                self._put(request, Response(error=problem))
                continue
            used += request.num_blocks
            num_sequences += len(request.sequences)
            self._begin(request)
            self._active.append(request)

    def _problem(self, request: _Request) -> str | None:
        num_prompt = len(request.prompt_ids)
        if num_prompt >= self.max_seq_len:
            return f"The prompt length ({num_prompt}) should be less than max_seq_len ({self.max_seq_len})"
        if request.max_tokens < 1:
            return "max_tokens must be positive"
        if any(not 0 <= i < self._config.vocab_size for i in request.prompt_ids):
            return "Token ID out of range"
        if request.params.guided_decoding is not None:
            return "Guided decoding is not followed by this engine"
        return None

    def _begin(self, request: _Request) -> None:
        hashes = self._block_hashes(request.prompt_ids, request.salt)
        num_cached = next((i for i, key in enumerate(hashes) if key not in self._cached), len(hashes))
        request.cached_tokens = min(num_cached * self.tokens_per_block, len(request.prompt_ids) - 1)
        if self._connector is not None:
            request.cached_tokens -= request.cached_tokens % self.tokens_per_block
            ids = request.sequences[0].context.ids
            request_id = request.output.request_id
            with _connected():
                request.cached_tokens += self._connector.begin(request_id, ids, request.cached_tokens, request.salt)
        request.prefill_left = len(request.prompt_ids) - request.cached_tokens
        if request.params.prompt_logprobs is not None:
            request.prompt_logprobs = self._score_prompt(request)
        self._keep(hashes)

    def _score_prompt(self, request: _Request) -> list[dict[int, Logprob]]:
        scored, context = [], Context(self._weights, request.prompt_ids[:1])
        for token in request.prompt_ids[1:]:
            logprobs = log_softmax(context.logits(self._config.vocab_size))
            scored.append(_top(logprobs, token, request.params.prompt_logprobs or 0))
            context.extend([token])
        return scored

    def _block_hashes(self, ids: list[int], salt: str) -> list[bytes]:
        if not self._args.kv_cache_config.enable_block_reuse:
            return []
        hashes, chain = [], hashlib.blake2b(salt.encode(), digest_size=16)
        size = self.tokens_per_block
        for start in range(0, len(ids) // size * size, size):
            chain.update(np.asarray(ids[start : start + size], np.int32).tobytes())
            hashes.append(chain.digest())
        return hashes

    def _keep(self, hashes: list[bytes]) -> None:
        for key in hashes:
            self._cached[key] = None
            self._cached.move_to_end(key)
        while len(self._cached) > self.num_blocks:
            self._cached.popitem(last=False)

    def _step(self, switches: Switches) -> None:
        scheduled = self._schedule(switches)
        if self._connector is not None:
            with _connected():
                wrong = self._connector.iterate([(r.output.request_id, num) for r, num in scheduled.values()])
            for request_id, seen in wrong.items():
                scheduled[request_id][0].sequences[0].context.taint(seen)
        for request, _ in scheduled.values():
            if request.prefill_left == 0:
                self._decode_all(request, switches)
        if self._args.enable_iter_perf_stats:
            self._note_stats()

    def _schedule(self, switches: Switches) -> dict[int, tuple[_Request, int]]:
        """By id the requests of this iteration, and how many tokens of each: a part of its prompt, or the newest."""
        budget, scheduled = self._args.max_num_tokens or 8192, {}
        for request in self._active:
            num_tokens = 1
            if request.prefill_left > 0:
                num_tokens = min(request.prefill_left, budget)
                if num_tokens == 0:
                    continue
                request.prefill_left -= num_tokens
                budget -= num_tokens
                time.sleep(num_tokens * switches.step_s_per_prompt_token)
            scheduled[request.output.request_id] = (request, num_tokens)
        return scheduled

    def _decode_all(self, request: _Request, switches: Switches) -> None:
        limit = switches.request_error_after
        for sequence in request.sequences:
            if not sequence.is_done:
                self._decode(request, sequence, switches)
            if self._is_faulty and limit is not None and len(sequence.new_ids) >= limit:
                self._put(request, Response(error="Sampling failed for this request"))
                break
        else:
            if not all(sequence.is_done for sequence in request.sequences):
                return
        self._active.remove(request)
        self._release(request)

    def _release(self, request: _Request) -> None:
        if self._connector is not None:
            with _connected():
                self._connector.finish(request.output.request_id)

    def _decode(self, request: _Request, sequence: _Sequence, switches: Switches) -> None:
        sequence.num_steps += 1
        finish = None
        for _ in range(switches.tokens_per_step):
            token = self._next(request, sequence, switches)
            sequence.context.extend([token])
            sequence.new_ids.append(token)
            finish = self._finish_of(request, sequence)
            if not (finish == "end_id" and switches.strip_end_id):
                sequence.pending_ids.append(token)
            if finish is not None:
                break
        is_due = sequence.num_steps == 1 or sequence.num_steps % self._args.stream_interval == 0
        if finish is not None or (is_due and request.output._streaming):
            self._answer(request, sequence, finish)

    def _next(self, request: _Request, sequence: _Sequence, switches: Switches) -> int:
        logits, params = sequence.context.logits(self._config.vocab_size), request.params
        if sequence.processors:
            import torch

            ids = list(sequence.context.ids)
            if switches.stale_processor_ids and not self._args.disable_overlap_scheduler and sequence.new_ids:
                ids = ids[:-1]  # The step before is still under way.
            for processor in sequence.processors:
                tensor = torch.from_numpy(logits).view(1, 1, -1)
                processor(request.output.request_id, tensor, [ids], None, None)
        end_id = params.end_id
        if switches.min_tokens_honoured and len(sequence.new_ids) < (params.min_tokens or 0) and end_id is not None:
            logits[end_id] = -np.inf
        key = draw_key(request.seed, sequence.index, len(sequence.new_ids))  # A resume draws from the start again.
        token = choose(params, logits, len(request.prompt_ids), sequence.context.ids, key)
        if params.logprobs:  # 0 counts as off.
            entry = _top(log_softmax(logits), token, params.logprobs)
            sequence.pending_logprobs.append(entry)
            if switches.logprobs_mismatch and self._is_faulty:
                sequence.pending_logprobs.append(entry)
        return token

    def _finish_of(self, request: _Request, sequence: _Sequence) -> Any:
        params = request.params
        if not params.ignore_eos and sequence.new_ids[-1] == params.end_id:
            return "end_id"
        for _, word in params._stop_reasons_and_words():
            if sequence.new_ids[-len(word) :] == word:
                return "stop_words"
        return "length" if len(sequence.new_ids) >= request.max_tokens else None

    def _answer(self, request: _Request, sequence: _Sequence, finish: Any, *, is_final: bool = False) -> None:
        new_ids, sequence.pending_ids = sequence.pending_ids, []
        logprobs, sequence.pending_logprobs = sequence.pending_logprobs, []
        if finish is not None:
            sequence.is_done = True
            self._keep(self._block_hashes(sequence.context.ids[:-1], request.salt))
        prompt_logprobs, request.prompt_logprobs = request.prompt_logprobs, None
        self._put(
            request,
            Response(
                sequence=sequence.index,
                new_ids=new_ids,
                logprobs=logprobs if request.params.logprobs else None,
                prompt_logprobs=prompt_logprobs,
                finish=finish,
                is_final=is_final,
                cached_tokens=request.cached_tokens,
                iteration=sequence.num_steps,
            ),
        )

    def _note_stats(self) -> None:
        used = sum(request.num_blocks for request in self._active)
        self.stats.append(
            {
                "iter": self._num_steps,
                "numActiveRequests": len(self._active),
                "numQueuedRequests": len(self._waiting),
                "kvCacheStats": {
                    "maxNumBlocks": self.num_blocks,
                    "freeNumBlocks": self.num_blocks - used,
                    "usedNumBlocks": used,
                    "tokensPerBlock": self.tokens_per_block,
                },
            }
        )
        del self.stats[: -self._args.max_stats_len]


@contextlib.contextmanager
def _connected() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise _ConnectorFailed from error


def _top(logprobs: np.ndarray, token: int, num: int) -> dict[int, Logprob]:
    order = np.argsort(-logprobs, kind="stable")
    entry = {int(i): Logprob(float(logprobs[i]), rank + 1) for rank, i in enumerate(order[:num])}
    if token not in entry:
        entry[token] = Logprob(float(logprobs[token]), int((logprobs > logprobs[token]).sum()) + 1)
    return entry
