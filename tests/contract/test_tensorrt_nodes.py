"""Engines over two instances, started as MPI's and TensorRT-LLM's launchers start them: stand-ins on this machine.

With Ray there is no launcher to stand in for: the double's workers are those of its own process, and the test shows
that the engine is asked for Ray, and what its loss does.
"""

from __future__ import annotations

import os
import signal

from trtllm_double import gpus
from trtllm_double.control import control

from engine.backends.tensorrt_llm import launch
from engine.backends.tensorrt_llm.processes import is_alive, marked
from tests.contract.fleet import Fleet, MakeBackend, request, until

PROMPT = [5, 17, 40, 99, 120, 33] * 6
MAX_TOKENS = 80


async def test_an_engine_over_two_instances_serves_loses_one_and_is_gone_as_a_unit(
    make_tensorrt_over_nodes: MakeBackend,
) -> None:
    async with Fleet(make_tensorrt_over_nodes) as fleet:
        oracle = await fleet.serve("p0", [["oracle"]])
        await fleet.leaders["p0"].submit(request("r", PROMPT, max_tokens=MAX_TOKENS))
        await until(lambda: len(oracle.tokens("r")) == MAX_TOKENS)
        control.set(num_gpus=7, step_s=0.02)
        old = await fleet.serve("p1", [["a"], ["b"]])
        (start,) = control.journal("start")[1:]
        is_ray = start["kwargs"].get("orchestrator_type") == "ray"
        assert start["kwargs"]["pipeline_parallel_size"] == 2
        assert start["kwargs"]["gpus_per_node"] == 1
        workers = control.journal("ready")[-1]["workers"]
        assert len(workers) == 2
        await fleet.leaders["p1"].submit(request("r", PROMPT, max_tokens=MAX_TOKENS))
        await until(lambda: len(old.tokens("r")) >= 5)
        mark = launch.mark_of(fleet.backends["node-0"]._settings.nats_url, "node-0", "p1")  # type: ignore[attr-defined] # TensorrtBackend
        job = marked(mark)
        assert set(workers) <= job
        os.kill(workers[1], signal.SIGKILL)
        await until(lambda: old.num_ended.get("p1") == 2)
        assert not [pid for pid in job if is_alive(pid)]
        assert gpus.use_of(0) is None
        assert gpus.use_of(1) is None
        if not is_ray:
            assert "the job is ended" in old.broken["p1"]
        last = old.last("r")
        assert last is not None
        assert last.interruption is not None
        new = await fleet.serve("p2", [["a"]])
        again = request("r", PROMPT, committed_ids=old.tokens("r"), attempt=1, max_tokens=MAX_TOKENS)
        assert (await fleet.leaders["p2"].submit(again)).accepted
        await until(lambda: any(entry.finish for entry in new.entries))
        assert old.tokens("r") + [token for entry in new.entries for token in entry.ids] == oracle.tokens("r")


async def test_an_engine_over_two_instances_ends_in_good_order(make_tensorrt_over_nodes: MakeBackend) -> None:
    async with Fleet(make_tensorrt_over_nodes) as fleet:
        recorder = await fleet.serve("p1", [["a"], ["b"]])
        await fleet.leaders["p1"].submit(request("r", PROMPT, max_tokens=20))
        await until(lambda: len(recorder.tokens("r")) == 20)
        fleet.leaders["p1"].arrange(None, 0.0)
        await until(lambda: recorder.num_ended.get("p1") == 2)
        assert not recorder.broken
        assert control.journal("shut_down")
        assert gpus.use_of(0) is None
        assert gpus.use_of(1) is None
