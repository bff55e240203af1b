"""The double keeps the ten pitfalls of TensorRT-LLM's API; each test names the one that it is about."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pynvml
import pytest
from tensorrt_llm import LLM, SamplingParams
from tensorrt_llm.executor.result import RequestOutput
from tensorrt_llm.llmapi import KvCacheConfig, RequestError
from trtllm_double.control import control

from tests.tiny_model import make_tiny_model

DEADLINE_S = 20.0
PROMPT = list(range(5, 45))
DOUBLES = Path(__file__).parents[2] / "doubles"
MakeLlm = Callable[..., AbstractContextManager[LLM]]


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(autouse=True)
def control_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRTLLM_DOUBLE_DIR", str(tmp_path / "double"))
    return tmp_path


@pytest.fixture
def make_llm(model_dir: Path) -> MakeLlm:
    @contextmanager
    def make(**arguments: Any) -> Iterator[LLM]:
        llm = LLM(model=str(model_dir), **arguments)
        try:
            yield llm
        finally:
            _force_shutdown(llm)

    return make


def _force_shutdown(llm: LLM) -> None:
    """The real way out: kill what does not end by itself."""
    import atexit

    atexit.unregister(llm.shutdown)
    if llm._executor is not None and not llm._executor.is_shutdown:
        llm._executor._stop.set()
        llm._executor._thread.join()
    if llm._workers is not None:
        for pid in llm._workers.pids:
            _kill(pid)
        llm._workers.stop()


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def params(max_tokens: int = 12, **given: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, **{"temperature": 1.0, "top_k": 1, "ignore_eos": True, **given})


def start(llm: LLM, prompt: list[int] | None = None, **given: Any) -> RequestOutput:
    return llm.generate_async(inputs=prompt or PROMPT, sampling_params=params(**given), streaming=True)


async def within(seconds: float, work: Any) -> Any:
    async with asyncio.timeout(seconds):
        return await work


async def never(work: Any, seconds: float = 0.3) -> None:
    with pytest.raises(TimeoutError):
        await within(seconds, work)


async def ids_of(result: RequestOutput) -> list[int]:
    await within(DEADLINE_S, result)
    return list(result.outputs[0].token_ids or [])


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.005)


# --- 1: cumulative, in place, shared


async def test_1_the_same_object_grows_in_place(make_llm: MakeLlm) -> None:
    with make_llm() as llm:
        result = start(llm)
        seen, lengths, lists = [], [], []
        async for output in result:
            seen.append(output)
            lengths.append(output.outputs[0].length)
            lists.append(output.outputs[0].token_ids)
        assert all(output is result for output in seen)
        assert all(one is lists[0] for one in lists)
        assert lengths == list(range(1, 13))


async def test_1_diffs_of_the_other_choices_are_stale(make_llm: MakeLlm) -> None:
    with make_llm() as llm:
        summed = 0
        async for output in (result := start(llm, n=2, top_k=5)):
            summed += sum(len(choice.token_ids_diff) for choice in output.outputs)
        assert all(len(choice.token_ids or []) == 12 for choice in result.outputs)
        assert summed > 24, "whoever adds up diffs counts twice"


async def test_1_one_response_can_bring_several_tokens(make_llm: MakeLlm) -> None:
    control.set(tokens_per_step=3)
    with make_llm(stream_interval=2) as llm:
        lengths = [output.outputs[0].length async for output in start(llm)]
        assert lengths == [3, 6, 12]


# --- 2: errors never set `finished`


async def test_2_a_request_error_leaves_it_unfinished_and_a_second_await_hangs(make_llm: MakeLlm) -> None:
    control.set(request_error_after=3)
    with make_llm() as llm:
        result = start(llm)
        with pytest.raises(RequestError):
            await within(DEADLINE_S, result)
        assert not result.finished
        await never(result)
        await never(anext(result))


async def test_2_a_forward_error_fails_all_active_requests(make_llm: MakeLlm) -> None:
    with make_llm() as llm:
        results = [start(llm, max_tokens=1000) for _ in range(3)]
        await within(DEADLINE_S, asyncio.gather(*(anext(result) for result in results)))
        control.set(forward_error_after=0)
        answers = await within(DEADLINE_S, asyncio.gather(*results, return_exceptions=True))
        assert [type(answer) for answer in answers] == [RequestError] * 3
        control.set()
        assert len(await ids_of(start(llm))) == 12, "the engine goes on"


async def test_2_any_other_exception_means_the_engine_is_dead(make_llm: MakeLlm) -> None:
    control.set(engine_error_after=2)
    with make_llm() as llm:
        with pytest.raises(RuntimeError, match="illegal memory access") as caught:
            await within(DEADLINE_S, start(llm))
        assert not isinstance(caught.value, RequestError)
        with pytest.raises(RuntimeError, match="LLM is shutting down"):
            start(llm)


# --- 3: abort is asynchronous


async def test_3_an_abort_is_answered_later_without_an_exception(make_llm: MakeLlm) -> None:
    with make_llm() as llm:
        result = start(llm, max_tokens=1000)
        await within(DEADLINE_S, anext(result))
        result.abort()
        assert not result.finished
        await within(DEADLINE_S, result)
        assert result.outputs[0].finish_reason == "cancelled"
        result.abort()  # It has ended: ignored.


async def test_3_an_abort_while_it_waits_is_never_answered(make_llm: MakeLlm) -> None:
    with make_llm(max_batch_size=1) as llm:
        first, second = start(llm, max_tokens=1000), start(llm)
        await within(DEADLINE_S, anext(first))
        second.abort()
        await never(second)
        first.abort()
        await within(DEADLINE_S, first)
        await never(second)


async def test_3_the_switch_drops_every_abort(make_llm: MakeLlm) -> None:
    control.set(drop_aborts="all")
    with make_llm() as llm:
        result = start(llm, max_tokens=1000)
        await within(DEADLINE_S, anext(result))
        result.abort()

        async def read() -> None:
            async for _ in result:
                pass

        await never(read())


# --- 4: result(timeout), loops


async def test_4_result_ignores_its_timeout(make_llm: MakeLlm) -> None:
    control.set(silent_after=0)
    with make_llm() as llm:
        result = start(llm)
        thread = threading.Thread(target=result.result, args=(0.01,), daemon=True)
        thread.start()
        await asyncio.to_thread(thread.join, 0.3)
        assert thread.is_alive()


def test_4_without_a_loop_it_cannot_be_awaited(make_llm: MakeLlm) -> None:
    with make_llm() as llm:
        result = start(llm)

        async def read() -> None:
            await result

        with pytest.raises(AssertionError, match="event loop was not present"):
            asyncio.run(read())
        assert len(result.result().outputs[0].token_ids or []) == 12
        assert [made["loop"] for made in control.journal("made")] == [None]
        assert control.journal("waits_in_its_thread")


def test_4_another_loop_than_the_one_it_was_made_on_is_an_error(make_llm: MakeLlm) -> None:
    with make_llm() as llm:

        async def make() -> RequestOutput:
            return start(llm)

        async def read(result: RequestOutput) -> None:
            await result

        result = asyncio.run(make())
        with pytest.raises(AssertionError, match="one event loop"):
            asyncio.run(read(result))


# --- 5: a dead worker is silent


async def test_5_a_killed_worker_means_silence_while_health_says_yes_and_shutdown_hangs(make_llm: MakeLlm) -> None:
    with make_llm(tensor_parallel_size=2) as llm:
        result = start(llm, max_tokens=1000)
        await within(DEADLINE_S, anext(result))
        assert llm._workers is not None
        _kill(llm._workers.pids[1])
        await until(lambda: llm._workers is not None and not llm._workers.all_alive())
        await asyncio.sleep(0.1)  # What was on its way.
        while result.queue._items:
            await anext(result)
        await never(anext(result))
        await never(start(llm))
        assert llm._check_health()
        thread = threading.Thread(target=llm.shutdown, daemon=True)
        thread.start()
        await asyncio.to_thread(thread.join, 0.3)
        assert thread.is_alive()


# --- 6: SamplingParams


async def test_6_thirty_two_tokens_and_greedy_unless_told(make_llm: MakeLlm) -> None:
    with make_llm() as llm:
        result = llm.generate_async(PROMPT, SamplingParams(ignore_eos=True), streaming=True)
        unset = await ids_of(result)
        assert len(unset) == 32
        assert unset == await ids_of(start(llm, max_tokens=32))


async def test_6_the_object_is_changed_and_its_second_use_noted(make_llm: MakeLlm) -> None:
    with make_llm() as llm:
        given = SamplingParams(max_tokens=3)
        for _ in range(2):
            await within(DEADLINE_S, llm.generate_async(PROMPT, given))
        assert given.end_id == 2
        assert [entry["reused"] for entry in control.journal("request")] == [False, True]


async def test_6_an_end_id_of_ones_own_skips_the_setup(make_llm: MakeLlm) -> None:
    with make_llm() as llm:
        [first, *_] = await ids_of(start(llm))
        result = llm.generate_async(PROMPT, SamplingParams(max_tokens=5, end_id=first), streaming=True)
        await within(DEADLINE_S, result)
        assert (result.outputs[0].token_ids, result.outputs[0].finish_reason) == ([first], "stop")
        failing = llm.generate_async(PROMPT, SamplingParams(max_tokens=5, end_id=2, stop="x"), streaming=True)
        with pytest.raises(RuntimeError, match="not processed by tokenizer"):
            await within(DEADLINE_S, failing)


# --- 7: stops


async def test_7_a_stop_token_is_taken_back_from_the_ids_but_not_from_the_logprobs(make_llm: MakeLlm) -> None:
    with make_llm() as llm:
        expected = await ids_of(start(llm))
        result = start(llm, stop_token_ids=[expected[5]], logprobs=2)
        lengths = [output.outputs[0].length async for output in result]
        position = expected.index(expected[5])
        assert result.outputs[0].token_ids == expected[:position]
        assert result.outputs[0].stop_reason == expected[5]
        assert len(result.outputs[0].logprobs or []) == position + 1
        assert lengths == [*range(1, position + 1), position]


async def test_7_a_word_that_was_streamed_is_taken_back(make_llm: MakeLlm) -> None:
    with make_llm() as llm:
        expected = await ids_of(start(llm))
        given = params()
        given.stop, given._stop_word_ids = "word", [expected[3:6]]
        given.end_id = 2
        lengths = []
        async for output in llm.generate_async(PROMPT, given, streaming=True):
            lengths.append(output.outputs[0].length)
        assert lengths == [1, 2, 3, 4, 5, 3]


async def test_7_a_mismatch_of_logprobs_is_an_assertion_inside_the_iteration(make_llm: MakeLlm) -> None:
    control.set(logprobs_mismatch=True)
    with make_llm() as llm, pytest.raises(AssertionError, match="logprobs length"):
        await within(DEADLINE_S, start(llm, logprobs=1))


# --- 8: unknown names (the tables' test has the rest)


async def test_8_what_is_not_configured_is_refused(make_llm: MakeLlm) -> None:
    from tensorrt_llm import DisaggregatedParams

    with make_llm() as llm:
        with pytest.raises(AssertionError, match="cache_transceiver_config"):
            llm.generate_async(PROMPT, disaggregated_params=DisaggregatedParams(request_type="context_only"))
        with pytest.raises(ValueError, match="collective RPC"):
            llm._collective_rpc("ping")


# --- 9: processes


def test_9_a_second_engine_is_refused_while_the_first_holds_the_gpu(make_llm: MakeLlm) -> None:
    with make_llm(tensor_parallel_size=2, pipeline_parallel_size=2) as llm:
        with pytest.raises(RuntimeError, match="Executor worker returned error") as caught, make_llm():
            pass
        assert "in use" in str(caught.value.__cause__)
        llm.shutdown()
        with make_llm(pipeline_parallel_size=3):
            pynvml.nvmlInit()
            held = [bool(pynvml.nvmlDeviceGetComputeRunningProcesses(i)) for i in range(4)]
            assert held == [True, True, True, False]


async def test_9_ids_begin_at_two_again(make_llm: MakeLlm) -> None:
    for _ in range(2):
        with make_llm() as llm:
            assert [start(llm).request_id, start(llm).request_id] == [2, 3]


def test_9_no_gpu_means_that_arguments_cannot_be_parsed(make_llm: MakeLlm) -> None:
    control.set(num_gpus=0)
    with pytest.raises(RuntimeError, match="NVIDIA driver"), make_llm():
        pass
    with pytest.raises(pynvml.NVMLError):
        pynvml.nvmlInit()


def test_9_more_gpus_than_there_are(make_llm: MakeLlm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    needs = make_llm(tensor_parallel_size=3)
    with pytest.raises(RuntimeError, match="Only 1 GPUs are available, but 3 are required"), needs:
        pass
    with make_llm():
        pynvml.nvmlInit()
        assert [bool(pynvml.nvmlDeviceGetComputeRunningProcesses(i)) for i in range(4)] == [False, False, True, False]


@pytest.mark.parametrize("phase", ["args", "spawn", "weights", "kv", "warmup"])
def test_9_a_start_fails_at_each_phase_and_frees_its_gpus(make_llm: MakeLlm, phase: Any) -> None:
    control.set(fail_phase=phase, fail_starts=[1])
    with pytest.raises(RuntimeError), make_llm():
        pass
    with make_llm() as llm:
        assert llm._check_health()


def test_9_a_start_takes_its_time(make_llm: MakeLlm) -> None:
    control.set(weights_s=0.1, warmup_s=0.1)
    started_s = time.monotonic()
    with make_llm():
        assert time.monotonic() - started_s > 0.2


def test_9_ray_leaks_into_the_environment(make_llm: MakeLlm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLLM_DISABLE_MPI", "")
    with make_llm(orchestrator_type="ray"):
        assert os.environ["TLLM_DISABLE_MPI"] == "1"


def test_9_importing_and_a_missing_guard_fail_in_a_process_of_their_own(control_dir: Path, model_dir: Path) -> None:
    script = control_dir / "engine.py"
    environ = {**os.environ, "PYTHONPATH": str(DOUBLES)}

    def run(text: str) -> str:
        script.write_text(text)
        done = subprocess.run([sys.executable, script], env=environ, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        return done.stderr

    unguarded = f"from tensorrt_llm import LLM\nLLM({str(model_dir)!r})\n"
    assert "guard" in run(unguarded)
    control.set(fail_phase="import")
    assert "libmpi" in run(unguarded)


def test_9_workers_outlive_a_killed_parent_and_hold_the_gpu(control_dir: Path, model_dir: Path) -> None:
    control.set(linger_s=0.5)
    script = control_dir / "engine.py"
    script.write_text(
        "import time\nfrom tensorrt_llm import LLM\n"
        f"if __name__ == '__main__':\n    llm = LLM({str(model_dir)!r})\n    time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, script], env={**os.environ, "PYTHONPATH": str(DOUBLES)}, process_group=0
    )
    deadline_s = time.monotonic() + DEADLINE_S
    while not control.journal("ready"):
        assert time.monotonic() < deadline_s
        assert process.poll() is None
        time.sleep(0.01)
    [worker] = control.journal("ready")[0]["workers"]
    pynvml.nvmlInit()
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert [entry.pid for entry in pynvml.nvmlDeviceGetComputeRunningProcesses(0)] == [worker]
    assert pynvml.nvmlDeviceGetMemoryInfo(0).used > 1 << 30
    while pynvml.nvmlDeviceGetComputeRunningProcesses(0):
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


# --- 10: a resume


@pytest.mark.parametrize("shape", [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 3}])
async def test_10_greedy_resumed_equals_undisturbed_in_any_shape(make_llm: MakeLlm, shape: dict[str, int]) -> None:
    with make_llm() as llm:
        expected = await ids_of(start(llm, max_tokens=20))
        assert len(set(expected)) > 10
    with make_llm(**shape) as llm:
        assert await ids_of(start(llm, PROMPT + expected[:7], max_tokens=13)) == expected[7:]


@pytest.mark.parametrize(
    "given", [{"frequency_penalty": 1.5}, {"seed": 7, "top_k": 0}, {"logprobs": None, "presence_penalty": 2.0}]
)
async def test_10_penalties_and_seeds_do_not_survive_a_resume(make_llm: MakeLlm, given: dict[str, Any]) -> None:
    with make_llm() as llm:
        given = {"prompt_ignore_length": len(PROMPT)} | given
        expected = await ids_of(start(llm, max_tokens=40, **given))
        assert expected == await ids_of(start(llm, max_tokens=40, **given))
        prompt = PROMPT + expected[:20]
        resumed = await ids_of(start(llm, prompt, max_tokens=20, **(given | {"prompt_ignore_length": len(prompt)})))
        assert resumed != expected[20:]


async def test_10_limits_hold_for_the_resumed_prompt(make_llm: MakeLlm) -> None:
    with make_llm(max_num_tokens=48, max_seq_len=64) as llm:
        with pytest.raises(RequestError, match="max_num_tokens"):
            start(llm, PROMPT + PROMPT[:9])
        clamped = start(llm, max_tokens=100)
        assert len(await ids_of(clamped)) == 24
        assert clamped.outputs[0].finish_reason == "length"
    with make_llm(max_num_tokens=48, max_seq_len=64, enable_chunked_prefill=True) as llm:
        assert len(await ids_of(start(llm, PROMPT + PROMPT[:9], max_tokens=3))) == 3
        with pytest.raises(RequestError, match="max_seq_len"):
            await within(DEADLINE_S, start(llm, PROMPT * 2))


async def test_10_a_prefix_that_was_computed_is_reused_and_salt_separates(make_llm: MakeLlm) -> None:
    with make_llm(kv_cache_config=KvCacheConfig(tokens_per_block=16)) as llm:
        cached = []
        for salt in (None, None, "tenant"):
            result = llm.generate_async(PROMPT, params(), cache_salt=salt)
            await within(DEADLINE_S, result)
            cached.append(result.cached_tokens)
        assert cached == [0, 32, 0]


async def test_10_tokens_depend_on_the_weights(make_llm: MakeLlm, tmp_path: Path) -> None:
    with make_llm() as llm:
        expected = await ids_of(start(llm))
    other = LLM(model=str(make_tiny_model(tmp_path / "other", seed=1)))
    assert await ids_of(start(other)) != expected
    other.shutdown()


# --- logits processors


class Favour:
    """Favours one token; counts its calls in its own (pickled) copy, and says what it saw."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_calls = 0

    def __call__(
        self, req_id: int, logits: Any, token_ids: list[list[int]], stream_ptr: int | None, client_id: int | None
    ) -> None:
        assert tuple(logits.shape[:2]) == (1, 1)
        self.num_calls += 1
        with self.path.open("a") as file:
            file.write(f"{len(token_ids[0])}\n")
        logits[0, 0, 100 + self.num_calls] = 1000.0


@pytest.mark.parametrize(("is_overlapped", "lag"), [(False, 0), (True, 1)])
async def test_a_logits_processor_works_on_a_copy_and_in_place(
    make_llm: MakeLlm, tmp_path: Path, is_overlapped: bool, lag: int
) -> None:
    with make_llm(disable_overlap_scheduler=not is_overlapped) as llm:
        processor = Favour(tmp_path / "seen")
        assert await ids_of(start(llm, max_tokens=4, logits_processor=processor)) == [101, 102, 103, 104]
        assert processor.num_calls == 0
        seen = [int(line) - len(PROMPT) for line in processor.path.read_text().split()]
        assert seen == [0, 1 - lag, 2 - lag, 3 - lag]


async def test_statistics_are_empty_until_the_first_request(make_llm: MakeLlm) -> None:
    with make_llm(enable_iter_perf_stats=True) as llm:
        assert llm.get_stats(0) == []
        await ids_of(start(llm))
        assert llm.get_stats(0)[0]["kvCacheStats"]["tokensPerBlock"] == 32
