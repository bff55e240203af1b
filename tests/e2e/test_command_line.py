"""`spotserve` as a user meets it: commands against a running `up`, its end, and what it says to bad input."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import nats
import pytest

from engine.protocol import EngineSubjects
from planner.protocol import PlannerSubjects
from tests.e2e.stack import Prompt, Session, Stack
from tests.tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Iterator[Stack]:
    options = ("--dtype", "float32", "--instances", "2", "--ranks-per-instance", "2")
    stack = Stack(tmp_path_factory.mktemp("stack") / "state", tiny, *options).start()
    yield stack
    stack.stop()


async def test_status_has_the_documented_keys(stack: Stack) -> None:
    async with Session(stack) as session:
        await session.quiet(2)
    status = stack.status()
    assert set(status) == {"epoch", "instances", "pipelines", "requests", "planner"}
    assert [set(i) for i in status["instances"]] == [{"id", "market", "state", "deadline_s", "ranks"}] * 2
    assert [i["state"] for i in status["instances"]] == ["ready", "ready"]
    assert [len(i["ranks"]) for i in status["instances"]] == [2, 2]
    pipeline = status["pipelines"][0]
    assert set(pipeline) == {"id", "stages", "running"}
    assert pipeline["stages"][0]["layers"][0] == 0
    assert pipeline["stages"][-1]["layers"][1] == 5
    assert set(pipeline["stages"][0]["shards"][0]) == {"rank", "instance", "head_groups"}
    assert status["requests"] == {"running": 0, "waiting": 0}


def test_people_can_read_it(stack: Stack) -> None:
    status = stack.command("status")
    assert status.returncode == 0, status.stderr
    assert "i0" in status.stdout
    plan = stack.command("plan")
    assert plan.returncode == 0, plan.stderr
    assert "chosen" in plan.stdout.lower()
    assert json.loads(stack.command("plan", "--json").stdout)


def test_chat_streams_an_answer(stack: Stack) -> None:
    answer = stack.command("chat", "hello")
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip()


async def test_an_instance_can_be_killed_and_added(stack: Stack) -> None:
    async with Session(stack) as session:
        await session.quiet(2)
        victim = (await session.ready_instances())[-1]
        assert stack.command("kill", victim).returncode == 0
        await session.until_gone(victim)
        assert stack.command("add", "--market", "on_demand").returncode == 0
        await session.quiet(2)
        markets = {i["id"]: i["market"] for i in stack.status()["instances"] if i["state"] == "ready"}
        assert sorted(markets.values()) == ["on_demand", "spot"]


def test_commands_name_what_they_do_not_know(stack: Stack) -> None:
    for command in ("preempt", "kill"):
        result = stack.command(command, "i99")
        assert result.returncode == 2
        assert "i99" in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1


async def test_malformed_messages_change_nothing(stack: Stack) -> None:
    async with Session(stack) as session:
        await session.quiet(2)
        epoch = (await session.status()).epoch
        running = stack.running
        planner, engine = PlannerSubjects(running.model), EngineSubjects(running.model)
        pipeline = next(iter(session.states))
        client = await nats.connect(running.nats_url)
        for subject in (
            planner.plan,
            planner.arrange,
            planner.status,
            planner.capacity("i0"),
            planner.inventory("i0"),
            planner.load("g"),
            planner.progress(1),
            engine.submit(pipeline),
            engine.cancel(pipeline),
            engine.resend(pipeline),
            engine.state(pipeline),
            engine.tokens("g", pipeline),
        ):
            await client.publish(subject, b"\xc1 not a message")
        await client.flush()
        await client.close()
        answer = await session.stream(Prompt(ids=(5, 6, 7), max_tokens=5))
        assert answer.error is None
        assert len(answer.ids) == 5
        assert (await session.status()).epoch == epoch


async def test_bad_requests_get_the_error_envelope(stack: Stack) -> None:
    async with httpx.AsyncClient(base_url=stack.base_url, timeout=20) as client:
        bad: list[tuple[dict[str, object], int, str | None]] = [
            ({"model": "nope", "prompt": "a"}, 404, "model"),
            ({"model": "tiny", "prompt": "a", "temperature": "hot"}, 400, "temperature"),
            ({"model": "tiny", "prompt": [1] * 5000}, 400, "prompt"),
            ({"model": "tiny", "prompt": [999999]}, 400, "prompt"),
        ]
        for body, status, parameter in bad:
            response = await client.post("/v1/completions", json=body)
            assert response.status_code == status, response.text
            error = response.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert error["param"] == parameter


def test_a_taken_port_is_one_clear_line(tiny: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        stack = Stack(tmp_path / "state", tiny)
        port = taken.getsockname()[1]
        result = stack.command("up", "--model", str(tiny), "--port", str(port))
    assert result.returncode == 2
    assert str(port) in result.stderr
    assert "--port" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_missing_tensor_is_named(tiny: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in tiny.iterdir():
        if path.suffix != ".safetensors":
            (broken / path.name).write_bytes(path.read_bytes())
    from safetensors.torch import load_file, save_file

    tensors = load_file(str(tiny / "model.safetensors"))
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, str(broken / "model.safetensors"))
    result = Stack(tmp_path / "state", broken).command("up", "--model", str(broken))
    assert result.returncode == 2
    assert "model.layers.3.mlp.up_proj.weight" in result.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_behind(tiny: Path, tmp_path: Path, number: int) -> None:
    stack = Stack(tmp_path / "state", tiny, "--instances", "2", "--dtype", "float32").start()
    assert len(stack.pids()) >= 8
    stack.stop(number)
