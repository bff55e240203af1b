"""The first two rows of the table on SmolLM2-135M, and the model's own text through the official SDK."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI, OpenAI

from deploy.default_model import cache_dir, default_model_dir
from tests.e2e.stack import Answer, Prompt, Session, Stack, Traffic

pytestmark = [pytest.mark.smollm, pytest.mark.timeout(600)]
MODEL = "SmolLM2-135M-Instruct"


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    model_dir = default_model_dir(cache_dir(os.environ))
    if not (model_dir / "model.safetensors").exists():
        pytest.skip("the default model is not here: run `make model`")
    state = tmp_path_factory.mktemp("stack") / "state"
    options = ("--reduction", "fixed", "--dtype", "float32", "--max-model-len", "2048")
    stack = Stack(state, Path(model_dir), *options).start()
    yield stack
    stack.stop()


# Six streams; long prompts, so that the cost model finds their KV worth moving.
PROMPTS = [
    Prompt(
        ids=tuple((131 * i + 17 * j) % 40000 + 100 for j in range(40 + 10 * i)),
        max_tokens=24,
        temperature=float(i % 2),
        seed=i,
    )
    for i in range(6)
]


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    return []


async def traffic(session: Session, expected: list[list[int]]) -> Traffic:
    if not expected:
        expected += [answer.ids for answer in await asyncio.gather(*map(session.stream, PROMPTS))]
    return Traffic(session, PROMPTS, expected)


async def test_a_preemption_with_notice_moves_the_kv(stack: Stack, expected: list[list[int]]) -> None:
    async with Session(stack) as session:
        await session.restore(3)
        async with await traffic(session, expected):
            await session.take_until_resumed(5.0)
        assert session.resumes, "nothing was interrupted"
        assert all(resume.recomputed_tokens == 0 for resume in session.resumes)
        await session.settled()


async def test_thirty_seconds_of_notice_are_used(stack: Stack) -> None:
    """The victim decodes on until its deadline is near, then its streams go on elsewhere with their KV."""
    async with Session(stack) as session:
        await session.restore(3)
        prompts = [dataclasses.replace(p, max_tokens=1900) for p in PROMPTS[:3]]  # Longer than the notice lasts.
        answers = [Answer() for _ in prompts]
        streams = [asyncio.create_task(session.stream(p, a)) for p, a in zip(prompts, answers, strict=True)]
        await session.until(lambda: all(len(answer.ids) >= 3 for answer in answers), "every stream decodes")
        victim = await session.serving_instance()
        notice_s = time.monotonic()
        await session.preempt(victim, 30.0)
        await session.until(lambda: session.resumes, "its streams are resumed elsewhere")
        assert time.monotonic() - notice_s > 20.0
        resumed = [(p, a) for p, a in zip(prompts, answers, strict=True) if a.id in session.seams]
        await session.until(lambda: all(len(a.ids) >= session.seams[a.id] + 3 for _, a in resumed), "they go on")
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
        assert all(resume.pulled_tokens > 0 and resume.recomputed_tokens == 0 for resume in session.resumes)
        await session.restore(3)
        for prompt, answer in resumed:
            undisturbed = await session.stream(dataclasses.replace(prompt, max_tokens=len(answer.ids)))
            assert answer.ids == undisturbed.ids


async def test_a_kill_without_notice_recomputes(stack: Stack, expected: list[list[int]]) -> None:
    async with Session(stack) as session:
        await session.restore(3)
        async with await traffic(session, expected):
            await session.take_until_resumed(None)
        assert any(resume.recomputed_tokens > 0 for resume in session.resumes)
        await session.settled()


def test_the_official_client(stack: Stack) -> None:
    client = OpenAI(base_url=stack.base_url + "/v1", api_key="none")
    assert [model.id for model in client.models.list()] == [MODEL]
    messages: Any = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    whole = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=12, temperature=0)
    stream = client.chat.completions.create(
        model=MODEL,
        messages=messages,
        max_tokens=12,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert "Paris" in str(whole.choices[0].message.content)
    assert text == whole.choices[0].message.content
    # Of the second prompt more may be cached.
    counts = [(u.prompt_tokens, u.completion_tokens) for u in (chunks[-1].usage, whole.usage) if u is not None]
    assert counts[0] == counts[1]


async def test_the_official_async_client(stack: Stack) -> None:
    async with AsyncOpenAI(base_url=stack.base_url + "/v1", api_key="none") as client:
        completion = await client.completions.create(
            model=MODEL, prompt="The capital of France is", max_tokens=8, temperature=0, stop=["\n"]
        )
        assert completion.choices[0].text.strip().startswith("Paris")
