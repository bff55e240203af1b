"""What a request returns: one object, changed in place as responses are taken from its queue."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from trtllm_double.control import control

from tensorrt_llm.disaggregated_params import DisaggregatedParams
from tensorrt_llm.sampling_params import SamplingParams

from .utils import RequestError

FinishReason = Literal["stop", "length", "timeout", "cancelled", "not_finished"]


class Logprob(NamedTuple):
    logprob: float
    rank: int | None = None


@dataclass(frozen=True)
class Response:
    sequence: int = 0
    new_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] | None = None
    prompt_logprobs: list[dict[int, Logprob]] | None = None
    finish: Literal["end_id", "stop_words", "length", "timeout", "cancelled"] | None = None
    is_final: bool = False
    error: str | None = None
    cached_tokens: int = 0
    iteration: int = 0


@dataclass(slots=True)
class CompletionOutput:
    index: int
    text: str = ""
    token_ids: list[int] | None = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    prompt_logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    generation_logits: Any = None
    additional_context_outputs: dict[str, Any] | None = None
    additional_generation_outputs: dict[str, Any] | None = None
    disaggregated_params: DisaggregatedParams | None = None
    request_perf_metrics: Any = None
    _last_text_len: int = field(default=0, init=False, repr=False)
    _last_token_ids_len: int = field(default=0, init=False, repr=False)
    _last_logprobs_len: int = field(default=0, init=False, repr=False)

    @property
    def length(self) -> int:
        return len(self.token_ids or [])

    @property
    def text_diff(self) -> str:
        return self.text[self._last_text_len :]

    @property
    def token_ids_diff(self) -> list[int]:
        return (self.token_ids or [])[self._last_token_ids_len :]

    @property
    def logprobs_diff(self) -> list[dict[int, Logprob]]:
        return (self.logprobs or [])[self._last_logprobs_len :]


class ResponseQueue:
    """Filled from the engine's thread. Either an event loop reads it, or a thread; decided when it is made."""

    def __init__(self) -> None:
        self._items: deque[Any] = deque()
        self._there = threading.Event()
        self.loop: asyncio.AbstractEventLoop | None = None
        with contextlib.suppress(RuntimeError):
            self.loop = asyncio.get_running_loop()
        self._loop_there = asyncio.Event()

    def put(self, item: Any) -> None:
        """Its reader hears of it by `notify`."""
        self._items.append(item)

    @staticmethod
    def notify(queues: list[ResponseQueue]) -> None:
        """Wake the readers of all that one iteration brought, at once."""
        for loop in {each.loop for each in queues}:
            touched = [each for each in queues if each.loop is loop]
            for each in touched:
                each._there.set()
            if loop is not None:
                with contextlib.suppress(RuntimeError):  # It is closed.
                    loop.call_soon_threadsafe(_wake, touched)

    def get(self) -> Any:
        while not self._items:
            self._there.clear()
            if not self._items:
                self._there.wait()
        return self._items.popleft()

    async def aget(self) -> Any:
        while not self._items:
            self._loop_there.clear()
            if not self._items:
                await self._loop_there.wait()
        return self._items.popleft()


def _wake(queues: list[ResponseQueue]) -> None:
    for each in queues:
        each._loop_there.set()


class RequestOutput:
    """Awaitable, and an iterator of itself."""

    def __init__(
        self,
        request_id: int,
        prompt: str | None,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        streaming: bool,
        executor: Any,
        decode: Callable[[list[int]], str] | None,
    ) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.prompt_token_ids = prompt_token_ids
        self.context_logits = None
        self.mm_embedding_handle = None
        self.cached_tokens = 0
        self.decoding_iter = 0
        self.avg_decoded_tokens_per_iter: float | None = None
        self.metrics_dict: dict[str, float] = {}
        self.disaggregated_params: DisaggregatedParams | None = None
        self.trace_headers: dict[str, str] | None = None
        self.do_tracing = False
        self._params = params
        self._streaming = streaming
        self._executor: Callable[[], Any] | None = weakref.ref(executor)
        self._decode = decode if params.detokenize else None
        assert params.best_of is not None
        self._outputs = [CompletionOutput(i) for i in range(params.best_of)]
        self._final: set[int] = set()
        self._done = False
        self._aborted = False
        self.queue = ResponseQueue()
        self._is_async = self.queue.loop is not None

    def __repr__(self) -> str:
        return f"RequestOutput(request_id={self.request_id}, outputs={self.outputs}, finished={self.finished})"

    @property
    def outputs(self) -> list[CompletionOutput]:
        if self._params.best_of == self._params.n:
            return self._outputs
        best = sorted(self._outputs, key=lambda o: o.cumulative_logprob or 0.0, reverse=True)[: self._params.n]
        for index, output in enumerate(best):
            output.index = index
        return best

    @property
    def finished(self) -> bool:
        return self._done

    def abort(self) -> None:
        assert self._executor is not None
        self._executor().abort_request(self.request_id)
        self._aborted = True

    def aborted(self) -> bool:
        return self._aborted

    def clear_logprob_params(self) -> None:
        self._params.logprobs = None
        self._params.prompt_logprobs = None

    def record_stats(self, output: CompletionOutput, stats: dict[str, float] | None = None) -> None:
        self.metrics_dict = stats or {}

    # --- reading ----------------------------------------------------------------------------------------------

    def result(self, timeout: float | None = None) -> RequestOutput:
        """The real one ignores `timeout` as well."""
        control.log("waits_in_its_thread", request_id=self.request_id)
        while not self._done:
            self._handle(self.queue.get())
        return self

    async def aresult(self) -> RequestOutput:
        while not self._done:
            await self._step()
        return self

    def __await__(self) -> Any:
        return self.aresult().__await__()

    def __iter__(self) -> RequestOutput:
        return self

    def __next__(self) -> RequestOutput:
        if self._done:
            raise StopIteration
        self._handle(self.queue.get())
        return self

    def __aiter__(self) -> RequestOutput:
        return self

    async def __anext__(self) -> RequestOutput:
        if self._done:
            raise StopAsyncIteration
        await self._step()
        return self

    async def _step(self) -> None:
        assert self._is_async, (
            "The asyncio event loop was not present during initialization, so async operations are not available."
        )
        assert self.queue.loop is asyncio.get_running_loop(), (
            "all requests of an executor must come from one event loop"
        )
        self._handle(await self.queue.aget())

    # --- responses --------------------------------------------------------------------------------------------

    def _handle(self, response: Response | BaseException) -> None:
        if isinstance(response, BaseException):
            executor = self._executor() if self._executor is not None else None
            if executor is not None:
                executor.shutdown()  # On the caller's thread; it can block.
            raise response
        if response.error is not None:
            raise RequestError(response.error)  # `finished` stays as it is.
        output = self._outputs[response.sequence]
        self.cached_tokens = response.cached_tokens
        self.decoding_iter = response.iteration
        self._extend(output, response)
        self._finish(output, response)
        if self._decode is not None:
            for each in self._outputs:  # Also those with stale diffs.
                each._last_text_len = len(each.text)
                each.text = self._decode(each.token_ids or [])
        if response.finish is not None:
            self._final.add(response.sequence)
        self._done = response.is_final or len(self._final) == len(self._outputs)

    def _extend(self, output: CompletionOutput, response: Response) -> None:
        assert output.token_ids is not None
        output._last_token_ids_len = len(output.token_ids)
        output.token_ids.extend(response.new_ids)  # In place.
        if response.logprobs is not None:
            output.logprobs = output.logprobs if output.logprobs is not None else []
            output._last_logprobs_len = len(output.logprobs)
            output.logprobs.extend(response.logprobs)
            output.cumulative_logprob = (output.cumulative_logprob or 0.0) + sum(
                entry[token].logprob for entry, token in zip(response.logprobs, response.new_ids, strict=False)
            )
            assert len(output.logprobs) == len(output.token_ids), (
                f"logprobs length: {len(output.logprobs)} != token_ids length: {len(output.token_ids)}"
            )
        if response.prompt_logprobs is not None:
            output.prompt_logprobs = response.prompt_logprobs

    def _finish(self, output: CompletionOutput, response: Response) -> None:
        match response.finish:
            case None:
                return
            case "end_id":
                output.finish_reason = "stop"
            case "stop_words":
                output.finish_reason = "stop"
                self._cut_stop_words(output)
            case reason:
                output.finish_reason = reason

    def _cut_stop_words(self, output: CompletionOutput) -> None:
        assert output.token_ids is not None
        for reason, word in self._params._stop_reasons_and_words():
            if output.token_ids[-len(word) :] == word:
                output.stop_reason = reason
                if not self._params.include_stop_str_in_output:
                    output.token_ids = output.token_ids[: -len(word)]  # Not from the logprobs.
                return
