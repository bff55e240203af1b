"""What TensorRT-LLM's API does wrong, and what the adapter makes of it. Each test names its pitfall (of ten).

The double (`tests/doubles/tensorrt_llm`) has a switch for each fault; the oracle is an undisturbed run.
"""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
from trtllm_double import gpus
from trtllm_double.control import control

from engine.backends.tensorrt_llm.processes import is_alive
from engine.errors import EngineError
from engine.protocol import FinishReason, RejectReason
from tests.contract.fleet import Fleet, MakeBackend, Recorder, request, until

ONE, TENSOR3 = [["a"]], [["a", "b", "c"]]
PROMPT = [5, 17, 40, 99, 120, 33] * 6
EOS = 2
NUM_GPUS = 7


async def tokens_of(fleet: Fleet, pipeline: str, name: str, **sampling: Any) -> list[int]:
    recorder = fleet.recorders[pipeline]
    reply = await fleet.leaders[pipeline].submit(request(name, PROMPT, **sampling))
    assert reply.accepted, reply
    await until(lambda: has_finished(recorder, name))
    return recorder.tokens(name)


def has_finished(recorder: Recorder, name: str) -> bool:
    last = recorder.last(name)
    return last is not None and last.finish is not None


def was_interrupted(recorder: Recorder, name: str) -> bool:
    last = recorder.last(name)
    return last is not None and last.interruption is not None


_oracle: dict[str, list[int]] = {}


async def undisturbed(make_tensorrt: MakeBackend, max_tokens: int = 24, **sampling: Any) -> list[int]:
    """Computed once for each sampling, as long as the longest that any test wants."""
    key = repr(sampling)
    if key not in _oracle:
        _oracle[key] = await computed(make_tensorrt, max_tokens=max_tokens if sampling else 120, **sampling)
    return _oracle[key][:max_tokens]


async def computed(make_tensorrt: MakeBackend, **sampling: Any) -> list[int]:
    async with Fleet(make_tensorrt) as fleet:
        await fleet.serve("p0", [["oracle"]])
        return await tokens_of(fleet, "p0", "r", **sampling)


async def resumed(fleet: Fleet, old: Recorder, shape: list[list[str]], **sampling: Any) -> list[int]:
    """What an interrupted request becomes on another pipeline."""
    new = await fleet.serve("p2", shape)
    before = old.tokens("r")
    again = request("r", PROMPT, committed_ids=before, attempt=1, **sampling)
    assert (await fleet.leaders["p2"].submit(again)).accepted
    await until(lambda: has_finished(new, "r"))
    return before + [token for entry in new.entries for token in entry.ids]


def num_starts() -> int:
    return len(control.journal("start"))


def workers() -> list[int]:
    return list(control.journal("ready")[-1]["workers"])


async def test_2_a_request_error_ends_that_request_alone(make_tensorrt: MakeBackend) -> None:
    control.set(num_gpus=NUM_GPUS, request_error_after=6)
    async with Fleet(make_tensorrt) as fleet:
        recorder = await fleet.serve("p1", ONE)
        assert await tokens_of(fleet, "p1", "long") != []
        entry = recorder.last("long")
        assert entry is not None
        assert entry.finish is FinishReason.ERROR
        assert "Sampling failed" in (entry.error or "")
        assert len(await tokens_of(fleet, "p1", "short", max_tokens=5)) == 5
        assert not recorder.broken


NAMES = ["r", "s", "t"]


async def several(fleet: Fleet, pipeline: str, max_tokens: int, old: Recorder | None = None) -> None:
    """Three streams at once, each with a prompt of its own; those of `old` go on."""
    for number, name in enumerate(NAMES):
        committed = old.tokens(name) if old is not None else []
        one = request(
            name, [*PROMPT, 60 + number], committed_ids=committed, attempt=bool(committed), max_tokens=max_tokens
        )
        assert (await fleet.leaders[pipeline].submit(one)).accepted


async def several_undisturbed(make_tensorrt: MakeBackend, max_tokens: int) -> dict[str, list[int]]:
    async with Fleet(make_tensorrt) as fleet:
        recorder = await fleet.serve("p0", [["oracle"]])
        await several(fleet, "p0", max_tokens)
        await until(lambda: all(has_finished(recorder, name) for name in NAMES))
        return {name: recorder.tokens(name) for name in NAMES}


async def test_2_a_failed_forward_pass_fails_all_at_once_and_no_client_hears_of_it(make_tensorrt: MakeBackend) -> None:
    expected = await several_undisturbed(make_tensorrt, 40)
    control.set(num_gpus=NUM_GPUS, forward_error_after=12, num_forward_errors=1, fault_starts=[num_starts() + 1])
    async with Fleet(make_tensorrt) as fleet:
        recorder = await fleet.serve("p1", ONE)
        num_before = len(control.journal("request"))
        await several(fleet, "p1", 40)
        await until(lambda: all(has_finished(recorder, name) for name in NAMES))
        assert {name: recorder.tokens(name) for name in NAMES} == expected
        assert len(control.journal("request")) - num_before == 2 * len(NAMES), "they did not fall together"
        assert not recorder.broken


async def test_2_an_engine_whose_forward_passes_all_fail_is_dead_and_all_are_resumed(
    make_tensorrt: MakeBackend,
) -> None:
    expected = await several_undisturbed(make_tensorrt, 40)
    control.set(num_gpus=NUM_GPUS, forward_error_after=12, fault_starts=[num_starts() + 1])
    async with Fleet(make_tensorrt) as fleet:
        old = await fleet.serve("p1", ONE)
        await several(fleet, "p1", 40)
        await until(lambda: "p1" in old.broken)
        assert "CUDA error in the forward pass" in old.broken["p1"]
        assert all(was_interrupted(old, name) for name in NAMES)
        assert not any(entry.error for entry in old.entries)
        new = await fleet.serve("p2", ONE)
        await several(fleet, "p2", 40, old)
        await until(lambda: all(has_finished(new, name) for name in NAMES))
        for name in NAMES:
            resumed_ids = [token for entry in new.entries if entry.request_id == name for token in entry.ids]
            assert old.tokens(name) + resumed_ids == expected[name]


async def test_2_a_request_that_fails_every_pass_that_it_is_in_ends_alone(make_tensorrt: MakeBackend) -> None:
    control.set(num_gpus=NUM_GPUS, step_s=0.01, poison_token=250)
    async with Fleet(make_tensorrt) as fleet:
        recorder = await fleet.serve("p1", ONE)
        await several(fleet, "p1", 100)
        await until(lambda: all(recorder.tokens(name) for name in NAMES))
        assert (await fleet.leaders["p1"].submit(request("poison", [250, *PROMPT]))).accepted
        await until(lambda: all(has_finished(recorder, name) for name in [*NAMES, "poison"]))
        poison = recorder.last("poison")
        assert poison is not None
        assert poison.finish is FinishReason.ERROR
        assert "forward pass" in (poison.error or "")
        assert all(len(recorder.tokens(name)) == 100 for name in NAMES)
        assert not recorder.broken


@pytest.mark.parametrize("fault", [{"engine_error_after": 8}, {"silent_after": 8}], ids=["raises", "is silent"])
async def test_2_and_5_an_engine_that_died_is_replaced_and_its_streams_go_on(
    make_tensorrt: MakeBackend, fault: dict[str, int]
) -> None:
    expected = await undisturbed(make_tensorrt)
    control.set(num_gpus=NUM_GPUS, fault_starts=[num_starts() + 1], **fault)
    async with Fleet(make_tensorrt) as fleet:
        old = await fleet.serve("p1", ONE)
        await fleet.leaders["p1"].submit(request("r", PROMPT))
        await until(lambda: "p1" in old.broken)
        assert was_interrupted(old, "r")
        assert await resumed(fleet, old, TENSOR3) == expected


async def test_5_a_worker_that_dies_silently_is_noticed_and_a_hanging_shutdown_is_killed(
    make_tensorrt: MakeBackend,
) -> None:
    expected = await undisturbed(make_tensorrt, max_tokens=120)
    async with Fleet(make_tensorrt) as fleet:
        old = await fleet.serve("p1", TENSOR3)
        await fleet.leaders["p1"].submit(request("r", PROMPT, max_tokens=120))
        await until(lambda: len(old.tokens("r")) >= 3)
        pids = workers()
        os.kill(pids[-1], signal.SIGKILL)
        await until(lambda: "p1" in old.broken)
        assert was_interrupted(old, "r")
        assert not [pid for pid in pids if is_alive(pid)], "the others hold their GPUs"
        assert await resumed(fleet, old, ONE, max_tokens=120) == expected


async def test_5_and_9_a_shutdown_that_hangs_is_killed_and_the_gpu_is_waited_for(make_tensorrt: MakeBackend) -> None:
    control.set(num_gpus=NUM_GPUS, shutdown_hangs=True, memory_lingers_s=1.0)
    async with Fleet(make_tensorrt) as fleet:
        old = await fleet.serve("p1", ONE)
        await fleet.leaders["p1"].submit(request("r", PROMPT, max_tokens=900))
        await until(lambda: len(old.tokens("r")) >= 3)
        fleet.leaders["p1"].arrange(None, 0.0)
        await until(lambda: "p1" in old.stopped)
        assert was_interrupted(old, "r")
        assert gpus.use_of(0) is None, "it was told to have stopped while its GPU was in use"
        assert control.journal("shutdown")
        assert not control.journal("shut_down")
        assert len(await resumed(fleet, old, ONE, max_tokens=60)) == 60


async def test_3_aborts_that_are_never_answered_hold_nothing_up(make_tensorrt: MakeBackend) -> None:
    control.set(num_gpus=NUM_GPUS, drop_aborts="all", step_s=0.1)
    async with Fleet(make_tensorrt) as fleet:
        # Eight of at most 116 tokens fit into the 64 blocks of 16: none waits inside the engine.
        recorder = await fleet.serve("p1", ONE)
        leader = fleet.leaders["p1"]
        for i in range(8):
            assert (await leader.submit(request(f"r{i}", PROMPT, max_tokens=80))).accepted
        await until(lambda: all(recorder.last(f"r{i}") for i in range(8)))
        for i in range(8):
            leader.cancel(f"r{i}")
        await until(lambda: all(has_finished(recorder, f"r{i}") for i in range(8)))
        assert {entry.finish for i in range(8) if (entry := recorder.last(f"r{i}"))} == {FinishReason.CANCELLED}
        control.set(num_gpus=NUM_GPUS)
        assert len(await tokens_of(fleet, "p1", "next", max_tokens=9)) == 9
        assert len(control.journal("abort")) == 8


async def test_4_requests_are_made_and_read_on_one_loop_and_no_thread_waits_for_a_result(
    make_tensorrt: MakeBackend,
) -> None:
    async with Fleet(make_tensorrt) as fleet:
        await fleet.serve("p1", ONE)
        for name in ("r", "s"):
            assert len(await tokens_of(fleet, "p1", name, max_tokens=6)) == 6
        loops = {made["loop"] for made in control.journal("made")}
        assert len(loops) == 1
        assert None not in loops
        assert not control.journal("waits_in_its_thread")


async def test_1_and_6_and_7_and_8_what_is_asked_of_the_engine(make_tensorrt: MakeBackend) -> None:
    """Fresh parameters, lengths always set, no text, no stop words, no end_id; several tokens in a response."""
    control.set(num_gpus=NUM_GPUS, tokens_per_step=3)
    async with Fleet(make_tensorrt) as fleet:
        recorder = await fleet.serve("p1", ONE)
        whole = await tokens_of(fleet, "p1", "whole", max_tokens=20)
        assert len(whole) == 20
        stop = whole[7]
        stopped = await tokens_of(fleet, "p1", "stopped", max_tokens=20, stop_token_ids=[stop])
        assert stopped == whole[: whole.index(stop) + 1]
        entry = recorder.last("stopped")
        assert entry is not None
        assert entry.finish is FinishReason.STOP
        asked = control.journal("request")
        assert [one["reused"] for one in asked] == [False] * len(asked)
        assert not any(one["detokenize"] or one["stop"] or one["end_id_given"] for one in asked)
        assert all(one["max_tokens"] is not None and one["temperature"] is not None and one["n"] == 1 for one in asked)
        assert not control.journal("end_id_given")
        assert not control.journal("loader_dropped")


@pytest.mark.usefixtures("with_torch")
@pytest.mark.parametrize("strip", [False, True], ids=["kept", "removed"])
async def test_7_an_end_of_sequence_token_is_the_last_of_the_log(make_tensorrt: MakeBackend, strip: bool) -> None:
    control.set(num_gpus=NUM_GPUS, strip_end_id=strip)
    async with Fleet(make_tensorrt) as fleet:
        recorder = await fleet.serve("p1", ONE)
        sampling: dict[str, Any] = {"ignore_eos": False, "eos_token_ids": [EOS], "logit_bias": {EOS: 9.0}}
        ids = await tokens_of(fleet, "p1", "r", max_tokens=150, **sampling)
        assert ids[-1] == EOS
        assert EOS not in ids[:-1]
        entry = recorder.last("r")
        assert entry is not None
        assert entry.finish is FinishReason.STOP


@pytest.mark.usefixtures("with_torch")
@pytest.mark.parametrize(
    "sampling",
    [
        {"presence_penalty": 1.5, "frequency_penalty": 0.7, "repetition_penalty": 1.3},
        {"temperature": 1.0, "seed": 5, "seeded": True, "logit_bias": {7: 5.5, 11: -100.0}, "min_p": 0.02},
    ],
    ids=["penalties", "seeded"],
)
async def test_10_a_resume_changes_nothing_of_what_we_choose_ourselves(
    make_tensorrt: MakeBackend, sampling: dict[str, Any]
) -> None:
    expected = await undisturbed(make_tensorrt, max_tokens=60, **sampling)
    control.set(num_gpus=NUM_GPUS, step_s=0.01)
    async with Fleet(make_tensorrt) as fleet:
        old = await fleet.serve("p1", ONE)
        await fleet.leaders["p1"].submit(request("r", PROMPT, max_tokens=60, **sampling))
        await until(lambda: len(old.tokens("r")) >= 8)
        fleet.leaders["p1"].arrange(None, 0.0)
        await until(lambda: "p1" in old.stopped)
        assert was_interrupted(old, "r")
        assert await resumed(fleet, old, ONE, max_tokens=60, **sampling) == expected


async def test_10_what_cannot_be_exact_is_refused_with_the_field(make_tensorrt: MakeBackend) -> None:
    async with Fleet(make_tensorrt) as fleet:
        await fleet.serve("p1", ONE)
        for sampling in ({"prompt_logprobs": 1}, {"logprobs": 2, "frequency_penalty": 1.0}):
            reply = await fleet.leaders["p1"].submit(request("r", PROMPT, **sampling))
            assert (reply.accepted, reply.reason) == (False, RejectReason.INVALID)
            assert f"sampling.{next(iter(sampling))}" in reply.detail


@pytest.mark.parametrize("phase", ["weights", "warmup"])
async def test_9_a_start_that_fails_says_why_and_the_next_one_runs(make_tensorrt: MakeBackend, phase: str) -> None:
    control.set(
        num_gpus=NUM_GPUS, fail_starts=[1], **({"dies_at": phase} if phase == "warmup" else {"fail_phase": phase})
    )
    async with Fleet(make_tensorrt) as fleet:
        pipeline = await fleet.pipeline("p1", ONE)
        await fleet.prepare(pipeline)
        recorder = fleet.begin(pipeline)
        await until(lambda: recorder.has_ended("p1"))
        cause = recorder.start_failed.get("p1") or recorder.broken.get("p1", "")
        words = {"weights": "out of memory", "warmup": "ended with 1"}
        assert words[phase] in cause
        await fleet.serve("p2", ONE)
        assert len(await tokens_of(fleet, "p2", "r", max_tokens=4)) == 4


@pytest.mark.parametrize(
    ("switches", "words"),
    [({"version": "1.2.0"}, "corrupts the KV cache"), ({"fail_phase": "import"}, "libmpi")],
    ids=["version", "import"],
)
async def test_8_and_9_a_package_that_cannot_be_used_is_one_clear_error(
    make_tensorrt: MakeBackend, switches: dict[str, Any], words: str
) -> None:
    control.set(num_gpus=NUM_GPUS, **switches)
    async with Fleet(make_tensorrt) as fleet:
        pipeline = await fleet.pipeline("p1", ONE)
        with pytest.raises(EngineError, match=words):
            await fleet.prepare(pipeline)


async def test_a_double_fault_the_successor_dies_while_it_starts(make_tensorrt: MakeBackend) -> None:
    expected = await undisturbed(make_tensorrt, max_tokens=120)
    control.set(num_gpus=NUM_GPUS, weights_s=1.0, step_s=0.01)
    async with Fleet(make_tensorrt) as fleet:
        old = await fleet.serve("p1", ONE)
        await fleet.leaders["p1"].submit(request("r", PROMPT, max_tokens=120))
        await until(lambda: len(old.tokens("r")) >= 3)
        os.kill(workers()[0], signal.SIGKILL)
        successor = await fleet.pipeline("p10", ONE)
        await fleet.prepare(successor)
        await until(lambda: "p1" in old.broken)
        before = num_starts()
        second = fleet.begin(successor)
        await until(lambda: num_starts() > before)
        os.kill(control.journal("start")[-1]["pid"], signal.SIGKILL)
        await until(lambda: second.has_ended("p10"))
        control.set(num_gpus=NUM_GPUS)
        assert await resumed(fleet, old, [["d"]], max_tokens=120) == expected
