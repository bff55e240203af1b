"""What every engine backend must do at the pipeline seam. The oracle is an undisturbed run on one rank."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from engine.backends.torch import communicator
from engine.core.roles import Position
from engine.core.step_meter import WINDOW_STEPS
from engine.errors import EngineError
from engine.protocol import FinishReason
from tests.contract.fleet import Fleet, MakeBackend, Recorder, request, until

ONE, TWO, THREE = [["a"]], [["a"], ["b"]], [["a"], ["b"], ["c"]]
TENSOR3 = [["a", "b", "c"]]
SEEDED = {"temperature": 1.0, "seed": 7, "seeded": True}
PROMPTS = {f"r{i}": [5 + i, 17, 40 + 3 * i, 99, 120, 33 + i] * (1 + 3 * i) for i in range(4)}


async def run_all(fleet: Fleet, pipeline: str, **sampling: Any) -> dict[str, list[int]]:
    recorder = fleet.recorders[pipeline]
    for name, prompt in PROMPTS.items():
        reply = await fleet.leaders[pipeline].submit(request(name, prompt, **sampling))
        assert reply.accepted, reply
    await until(lambda: all(has_finished(recorder, name) for name in PROMPTS))
    return {name: recorder.tokens(name) for name in PROMPTS}


def has_finished(recorder: Recorder, name: str) -> bool:
    last = recorder.last(name)
    return last is not None and last.finish is not None


_oracle: dict[tuple[str, str], dict[str, list[int]]] = {}


async def undisturbed(make_backend: MakeBackend, **sampling: Any) -> dict[str, list[int]]:
    """Computed once for each kind of backend and sampling."""
    key = (make_backend.kind, repr(sampling))
    if key not in _oracle:
        async with Fleet(make_backend) as fleet:
            await fleet.serve("p0", [["oracle"]])
            _oracle[key] = await run_all(fleet, "p0", **sampling)
    return _oracle[key]


@pytest.mark.usefixtures("with_torch")
@pytest.mark.parametrize("shape", [TWO, THREE, TENSOR3, [["a", "b", "c"], ["d", "e", "f"]]])
async def test_every_shape_gives_the_same_tokens(any_backend: MakeBackend, shape: list[list[str]]) -> None:
    if any_backend.kind != "torch" and shape in (THREE, TENSOR3):
        pytest.skip("each engine takes seconds to build; the shape of both has them")
    expected = await undisturbed(any_backend)
    assert len({tuple(tokens) for tokens in expected.values()}) == len(PROMPTS)
    async with Fleet(any_backend) as fleet:
        await fleet.serve("p1", shape)
        assert await run_all(fleet, "p1") == expected


@pytest.mark.parametrize(
    ("before", "after"),
    [(ONE, TWO), (TWO, THREE), (THREE, ONE), (ONE, TENSOR3), (TENSOR3, ONE), (THREE, [["d"]]), (ONE, [["d"]])],
)
@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, SEEDED])
async def test_arranged_sequences_resume_with_their_kv(
    make_backend: MakeBackend, before: list[list[str]], after: list[list[str]], sampling: dict[str, Any]
) -> None:
    await arranged_then_resumed(make_backend, before, after, sampling)


@pytest.mark.usefixtures("with_torch")
@pytest.mark.parametrize(("before", "after", "sampling"), [(ONE, TENSOR3, {"temperature": 0.0}), (TWO, ONE, SEEDED)])
async def test_an_arranged_pipeline_is_rebuilt_in_another_shape(
    make_tensorrt: MakeBackend, before: list[list[str]], after: list[list[str]], sampling: dict[str, Any]
) -> None:
    await arranged_then_resumed(make_tensorrt, before, after, sampling)


async def arranged_then_resumed(
    make_backend: MakeBackend, before: list[list[str]], after: list[list[str]], sampling: dict[str, Any]
) -> None:
    moves_kv = make_backend.moves_kv
    expected = await undisturbed(make_backend, **sampling)
    async with Fleet(make_backend) as fleet:
        old = await fleet.serve("p1", before)
        for name, prompt in PROMPTS.items():
            await fleet.leaders["p1"].submit(request(name, prompt, **sampling))
        await until(lambda: all(len(old.tokens(name)) >= 5 for name in PROMPTS))
        pipeline = await fleet.pipeline("p2", after)
        reports = await fleet.prepare(pipeline)
        assert sum(report.disk_bytes for report in reports) == 0, "all weights are held by somebody"
        fleet.leaders["p1"].arrange(None, 0.0)
        await until(lambda: "p1" in old.stopped)
        new = await fleet.start(pipeline)
        for name, prompt in PROMPTS.items():
            interrupted = old.last(name)
            assert interrupted is not None
            if interrupted.finish is not None:
                continue
            assert interrupted.interruption is not None
            assert (interrupted.interruption.kv_source is not None) is moves_kv
            resumed = request(
                name,
                prompt,
                committed_ids=old.tokens(name),
                kv_source=interrupted.interruption.kv_source,
                attempt=1,
                **sampling,
            )
            assert (await fleet.leaders["p2"].submit(resumed)).accepted
        await until(lambda: all(has_finished(new, n) or has_finished(old, n) for n in PROMPTS))
        for name in PROMPTS:
            resumed_entries = [e for e in new.entries if e.request_id == name]
            tokens = old.tokens(name)
            for entry in resumed_entries:
                assert entry.index == len(tokens)
                tokens += entry.ids
            assert tokens == expected[name]
            if resumed_entries:
                assert resumed_entries[0].resume is not None
                assert (resumed_entries[0].resume.recomputed_tokens == 0) is moves_kv
                assert (resumed_entries[0].resume.pulled_tokens > 0) is moves_kv


async def test_a_lost_source_means_recompute_and_the_same_tokens(any_backend: MakeBackend) -> None:
    expected = await undisturbed(any_backend)
    async with Fleet(any_backend) as fleet:
        old = await fleet.serve("p1", ONE)
        await fleet.leaders["p1"].submit(request("r3", PROMPTS["r3"]))
        await until(lambda: len(old.tokens("r3")) >= 5)
        fleet.leaders["p1"].arrange(None, 0.0)
        await until(lambda: "p1" in old.stopped)
        interrupted = old.last("r3")
        assert interrupted is not None
        assert interrupted.interruption is not None
        await fleet.lose("a")
        new = await fleet.serve("p2", [["d"]])
        await fleet.leaders["p2"].submit(
            request(
                "r3",
                PROMPTS["r3"],
                committed_ids=old.tokens("r3"),
                kv_source=interrupted.interruption.kv_source,
                attempt=1,
            )
        )
        await until(lambda: has_finished(new, "r3"))
        first = next(e for e in new.entries if e.ids)
        assert first.resume is not None
        assert first.resume.pulled_tokens == 0
        assert first.resume.recomputed_tokens > 0
        resumed = [token for entry in new.entries for token in entry.ids]
        assert old.tokens("r3") + resumed == expected["r3"]


async def test_an_aborted_pipeline_tells_every_rank(any_backend: MakeBackend) -> None:
    async with Fleet(any_backend) as fleet:
        recorder = await fleet.serve("p1", THREE)
        await fleet.leaders["p1"].submit(request("r0", PROMPTS["r0"], max_tokens=500))
        await until(lambda: len(recorder.tokens("r0")) >= 2)
        fleet.leaders["p1"].abort("test")
        await until(lambda: "p1" in recorder.broken)
        # All three positions are free again: the ranks can take part in another pipeline.
        again = await fleet.serve("p2", THREE)
        await fleet.leaders["p2"].submit(request("r0", PROMPTS["r0"]))
        await until(lambda: has_finished(again, "r0"))


async def test_too_few_blocks_evict_and_give_the_same_tokens(any_backend: MakeBackend) -> None:
    expected = await undisturbed(any_backend)
    async with Fleet(any_backend) as fleet:
        # Each sequence fits alone (at most 84 tokens, 6 blocks), but not all of them together.
        await fleet.serve("p1", ONE, num_kv_blocks=8)
        assert await run_all(fleet, "p1") == expected
        leader = fleet.leaders["p1"]
        await until(lambda: leader.snapshot().free_kv_blocks == leader.snapshot().total_kv_blocks)


async def test_cancel_ends_a_request_and_frees_its_blocks(any_backend: MakeBackend) -> None:
    async with Fleet(any_backend) as fleet:
        recorder = await fleet.serve("p1", TWO)
        leader = fleet.leaders["p1"]
        await leader.submit(request("r0", PROMPTS["r0"], max_tokens=500))
        await until(lambda: len(recorder.tokens("r0")) >= 2)
        leader.cancel("r0")
        await until(lambda: has_finished(recorder, "r0"))
        last = recorder.last("r0")
        assert last is not None
        assert last.finish is FinishReason.CANCELLED
        await until(lambda: leader.snapshot().free_kv_blocks == leader.snapshot().total_kv_blocks)


@pytest.mark.parametrize("shape", [ONE, TWO])
async def test_a_leader_measures_its_decode_steps(any_backend: MakeBackend, shape: list[list[str]]) -> None:
    async with Fleet(any_backend) as fleet:
        recorder = await fleet.serve("p1", shape)
        leader = fleet.leaders["p1"]
        started_s = time.perf_counter()
        for name in ("r0", "r1"):
            await leader.submit(request(name, PROMPTS[name], max_tokens=100, ignore_eos=True))
        await until(lambda: all(has_finished(recorder, name) for name in ("r0", "r1")))
        took_s = time.perf_counter() - started_s
        measured = leader.snapshot().measured_step
        assert measured is not None
        assert 1 < measured.num_sequences <= 2
        assert 0 < measured.mean_context_tokens < 200
        assert 0 < measured.num_steps <= 200
        # Every sequence gets a token in a step, and 100 in all: no window took longer than the whole.
        assert 0 < measured.mean_step_ms / 1000 * WINDOW_STEPS / len(shape) < took_s


async def test_the_log_is_resent_from_any_index_also_after_the_end(any_backend: MakeBackend) -> None:
    async with Fleet(any_backend) as fleet:
        recorder = await fleet.serve("p1", ONE)
        leader = fleet.leaders["p1"]
        await leader.submit(request("r0", PROMPTS["r0"]))
        await until(lambda: has_finished(recorder, "r0"))
        entry = await leader.resend("r0", 0, 3)
        assert entry is not None
        assert (entry.index, entry.ids) == (3, recorder.tokens("r0")[3:])
        leader.arrange(None, 0.0)
        await until(lambda: "p1" in recorder.stopped)
        assert await leader.resend("r0", 0, 3) == entry
        assert await leader.resend("unknown", 0, 0) is None
        assert not (await leader.submit(request("r1", PROMPTS["r1"]))).accepted


async def test_a_cancelled_notice_lets_the_pipeline_go_on(any_backend: MakeBackend) -> None:
    async with Fleet(any_backend) as fleet:
        recorder = await fleet.serve("p1", ONE, num_kv_blocks=128)
        leader = fleet.leaders["p1"]
        assert (await leader.submit(request("r0", PROMPTS["r0"], max_tokens=1900))).accepted
        await until(lambda: len(recorder.tokens("r0")) >= 1)
        deadline_s = time.time() + 3.0  # It would stop 2 s before.
        leader.arrange(deadline_s, 0.0)
        assert leader.is_draining()
        leader.carry_on()
        assert not leader.is_draining()
        await until(lambda: time.time() > deadline_s - 1.0 or "p1" in recorder.stopped)
        before = len(recorder.tokens("r0"))
        await until(lambda: len(recorder.tokens("r0")) > before + 5)
        assert "p1" not in recorder.stopped
        leader.cancel("r0")


async def test_a_pipeline_under_notice_goes_on_until_its_deadline_allows(any_backend: MakeBackend) -> None:
    async with Fleet(any_backend) as fleet:
        recorder = await fleet.serve("p1", ONE, num_kv_blocks=128)
        assert (await fleet.leaders["p1"].submit(request("r0", PROMPTS["r0"], max_tokens=1900))).accepted
        await until(lambda: len(recorder.tokens("r0")) >= 1)
        deadline_s = time.time() + 4.0  # The margin of 2 s and the migration of 0.5 s leave 1.5 s to decode.
        before = len(recorder.tokens("r0"))
        fleet.leaders["p1"].arrange(deadline_s, 0.5)
        await until(lambda: "p1" in recorder.stopped)
        assert deadline_s - 3.0 < time.time() < deadline_s - 0.5
        assert len(recorder.tokens("r0")) > before + 5


async def test_a_group_that_never_forms_is_an_error_that_names_the_pipeline(make_backend: MakeBackend) -> None:
    async with Fleet(make_backend) as fleet:
        pipeline = await fleet.pipeline("p1", TWO)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(communicator, "FORM_TIMEOUT_S", 0.5)
            backend = fleet.backends["a"]
            position = Position(pipeline, 0, 0, 1, dict(fleet._addresses))
            with pytest.raises(EngineError, match="p1"):
                await asyncio.wait_for(backend.prepare(position, []), 20)
