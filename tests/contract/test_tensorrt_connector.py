"""The KV connector in engines of the double, whose KV tells what it was computed from: wrong KV makes wrong tokens."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from trtllm_double.control import control

from engine.backends.tensorrt_llm import kv_connector
from engine.backends.tensorrt_llm.kv_store import KV_VARIABLE
from engine.backends.tensorrt_llm.llm import build
from engine.backends.tensorrt_llm.wire import EngineSpec
from engine.protocol import FinishReason
from tests.contract.fleet import Fleet, MakeBackend, Recorder, request, until

SIZE = 16
PROMPT = [(7 * i * i + 3 * i) % 250 + 3 for i in range(5 * SIZE + 3)]
LONG = 60


class Engine:
    """An engine in this process, built as its own process builds it."""

    def __init__(self, spec: EngineSpec) -> None:
        self.llm, _ = build(spec)

    async def ask(self, prompt: list[int], salt: str | None = None, max_tokens: int = 24) -> tuple[list[int], int]:
        """Tokens, and how many of the prompt were cached."""
        from tensorrt_llm import SamplingParams

        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, detokenize=False)
        asked = self.llm.generate_async(inputs=prompt, sampling_params=params, streaming=True, cache_salt=salt)
        async with asyncio.timeout(30.0):
            async for _ in asked:
                pass
        return list(asked.outputs[0].token_ids), asked.cached_tokens


class Engines:
    def __init__(self, model_dir: Path, folder: Path) -> None:
        self._facts: dict[str, Any] = {
            "model_dir": str(model_dir),
            "dtype": "float32",
            "tensor": 1,
            "layers": [6],
            "gpus_per_node": 8,
            "max_batch": 4,
            "max_model_len": 512,
            "max_num_tokens": 32,
            "block_tokens": SIZE,
            "num_kv_blocks": 64,
            "kv_dir": str(folder),
            "kv_limit_bytes": 1 << 24,
        }

    @asynccontextmanager
    async def start(self, **changes: Any) -> AsyncIterator[Engine]:
        """A new engine: nothing but the files outlives it."""
        engine = Engine(EngineSpec(**(self._facts | changes)))
        yield engine
        await asyncio.to_thread(engine.llm.shutdown)


@pytest.fixture
def engines(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Engines:
    monkeypatch.setenv("TRTLLM_DOUBLE_DIR", str(tmp_path / "double"))
    monkeypatch.setenv(KV_VARIABLE, "")
    control.set(num_gpus=8, step_s=0.0)
    return Engines(model_dir, tmp_path / "kv")


async def expected(engines: Engines, *prompts: list[int]) -> list[list[int]]:
    """Without a connector."""
    async with engines.start(kv_dir="") as engine:
        return [(await engine.ask(prompt))[0] for prompt in prompts]


@pytest.mark.parametrize("shape", [{}, {"tensor": 3}, {"layers": [2, 4]}], ids=["one", "tensor", "stages"])
async def test_a_new_engine_of_the_same_shape_goes_on_from_the_blocks_of_the_old_one(
    engines: Engines, shape: dict[str, Any]
) -> None:
    (whole,) = await expected(engines, PROMPT)
    async with engines.start(**shape) as engine:
        assert await engine.ask(PROMPT) == (whole, 0)
    resumed = [*PROMPT, *whole[:20]]  # 6 full blocks: generated tokens fill the sixth.
    async with engines.start(**shape) as engine:
        tokens, num_cached = await engine.ask(resumed, max_tokens=4)
        assert tokens == whole[20:]
        assert num_cached == 6 * SIZE
        assert await engine.ask(resumed, max_tokens=4) == (whole[20:], 6 * SIZE), "now they are on the device"
    assert not control.journal("wrong_kv")


async def test_another_shape_loads_nothing(engines: Engines) -> None:
    (whole,) = await expected(engines, PROMPT)
    async with engines.start() as engine:
        await engine.ask(PROMPT)
    for shape in ({"tensor": 3}, {"layers": [3, 3]}, {"block_tokens": 8}):
        async with engines.start(**shape) as engine:
            assert await engine.ask(PROMPT) == (whole, 0)


async def test_blocks_do_not_cross_salts(engines: Engines) -> None:
    (whole,) = await expected(engines, PROMPT)
    async with engines.start() as engine:
        await engine.ask(PROMPT, salt="one tenant")
    async with engines.start() as engine:
        assert await engine.ask(PROMPT, salt="another") == (whole, 0)
        assert await engine.ask(PROMPT) == (whole, 0)
    async with engines.start() as engine:
        assert await engine.ask(PROMPT, salt="one tenant") == (whole, 5 * SIZE)


async def test_an_equal_block_behind_another_prefix_is_not_loaded(engines: Engines) -> None:
    changed = [PROMPT[0] + 1, *PROMPT[1:]]
    (whole,) = await expected(engines, changed)
    async with engines.start() as engine:
        await engine.ask(PROMPT)
    async with engines.start() as engine:
        assert await engine.ask(changed) == (whole, 0)


async def test_a_key_without_the_prefix_would_be_seen_as_wrong_tokens(
    engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is the fault of the example that comes with TensorRT-LLM; it shows that the tests above can fail."""

    def of_the_block_alone(root: bytes, tokens: list[int], size: int) -> list[str]:
        blocks = [tokens[i : i + size] for i in range(0, len(tokens) - size + 1, size)]
        return [hashlib.sha256(repr(block).encode()).hexdigest() for block in blocks]

    monkeypatch.setattr(kv_connector, "chain", of_the_block_alone)
    first, second = PROMPT[:SIZE], PROMPT[SIZE : 2 * SIZE]
    swapped = [*second, *first, 9]
    (whole,) = await expected(engines, swapped)
    async with engines.start() as engine:
        await engine.ask([*first, *second, 9])
    async with engines.start() as engine:
        tokens, num_cached = await engine.ask(swapped)
        assert num_cached == 2 * SIZE
        assert tokens != whole
    assert control.journal("wrong_kv")


def tokens_of(*recorders: Recorder) -> list[int]:
    return [token for recorder in recorders for entry in recorder.entries for token in entry.ids]


async def resume(fleet: Fleet, old: Recorder, shape: list[list[str]]) -> Recorder:
    new = await fleet.serve("p2", shape)
    again = request("r", PROMPT, committed_ids=old.tokens("r"), attempt=1, max_tokens=LONG)
    assert (await fleet.leaders["p2"].submit(again)).accepted
    await until(lambda: any(entry.finish for entry in new.entries))
    assert new.entries[-1].finish is FinishReason.LENGTH
    return new


async def test_an_arranged_pipeline_of_the_same_shape_goes_on_from_its_kv(
    make_tensorrt_with_connector: MakeBackend, engines: Engines
) -> None:
    async with engines.start(kv_dir="") as engine:
        whole, _ = await engine.ask(PROMPT, max_tokens=LONG)
    control.set(num_gpus=7, step_s=0.01)
    async with Fleet(make_tensorrt_with_connector) as fleet:
        old = await fleet.serve("p1", [["a", "b", "c"]])
        await fleet.leaders["p1"].submit(request("r", PROMPT, max_tokens=LONG))
        await until(lambda: len(old.tokens("r")) >= 20)
        fleet.leaders["p1"].arrange(None, 0.0)
        await until(lambda: "p1" in old.stopped)
        new = await resume(fleet, old, [["a", "b", "c"]])
        assert tokens_of(old, new) == whole
        first = next(entry for entry in new.entries if entry.cached_tokens is not None)
        assert (first.cached_tokens or 0) >= 5 * SIZE
    assert not control.journal("wrong_kv")


async def test_a_connector_that_raises_is_the_engines_end_and_its_sequences_resume(
    make_tensorrt_with_connector: MakeBackend, engines: Engines, tmp_path: Path
) -> None:
    async with engines.start(kv_dir="") as engine:
        whole, _ = await engine.ask(PROMPT, max_tokens=LONG)
    control.set(num_gpus=7, step_s=0.01)
    async with Fleet(make_tensorrt_with_connector) as fleet:
        old = await fleet.serve("p1", [["a"]])
        await fleet.leaders["p1"].submit(request("r", PROMPT, max_tokens=LONG))
        await until(lambda: len(old.tokens("r")) >= 5)
        fleet.leaders["p1"].arrange(None, 0.0)
        await until(lambda: "p1" in old.stopped)
        files = list(tmp_path.glob("store/*/kv/*.kv"))
        assert files
        for path in files:
            path.write_bytes(path.read_bytes()[:-1])
        broken = await fleet.serve("p3", [["b"]])
        again = request("r", PROMPT, committed_ids=old.tokens("r"), attempt=1, max_tokens=LONG)
        assert (await fleet.leaders["p3"].submit(again)).accepted
        await until(lambda: "p3" in broken.broken)
        assert "KV block" in broken.broken["p3"]
        (entry,) = broken.entries
        assert entry.interruption is not None
        new = await resume(fleet, old, [["c"]])
        assert tokens_of(old, new) == whole
