"""The KV connector against the double's base classes: what one engine computed, the next one of its shape loads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from tensorrt_llm._torch.pyexecutor.kv_cache_connector import RequestData, SchedulerOutput

from engine.backends.tensorrt_llm.kv_connector import BlockScheduler, BlockWorker
from engine.backends.tensorrt_llm.kv_store import KV_VARIABLE, KvIdentity

SIZE = 4


@dataclass
class Request:
    request_id: int
    tokens: list[int]
    cache_salt_id: int | None = None

    def get_tokens(self, beam: int) -> list[int]:
        return self.tokens


class Engine:
    """The calls of one rank's iterations, with a pool whose blocks tell what was computed into them."""

    def __init__(self, num_blocks: int = 16) -> None:
        self.scheduler, self.worker = BlockScheduler(None), BlockWorker(None)
        self.pool = torch.zeros((num_blocks, 2, SIZE), dtype=torch.bfloat16)
        self.worker.register_kv_caches(self.pool)

    def step(self, new: list[RequestData], cached: list[RequestData], computes: dict[int, float]) -> None:
        self.worker.bind_connector_meta(self.scheduler.build_connector_meta(SchedulerOutput(new, cached)))
        self.worker.start_load_kv(None)
        for block, value in computes.items():
            self.pool[block] = value
        self.worker.wait_for_save(None)

    def matched(self, request: Request, on_device: int = 0) -> int:
        num_tokens, is_async = self.scheduler.get_num_new_matched_tokens(request, on_device)
        assert not is_async
        return num_tokens


@pytest.fixture(autouse=True)
def identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KvIdentity:
    made = KvIdentity(str(tmp_path), 1 << 20, "m", "bfloat16", SIZE, 1, [6])
    monkeypatch.setenv(KV_VARIABLE, msgspec.json.encode(made).decode())
    return made


def prefill(engine: Engine, tokens: list[int], **fields: Any) -> None:
    """A prompt whose block number b is computed as b + 1, in blocks from 0 on."""
    request = Request(1, tokens, **fields)
    done = engine.matched(request)
    blocks = list(range(-(-len(tokens) // SIZE)))
    data = RequestData(1, tokens, blocks, done, len(tokens) - done)
    engine.step([data], [], {block: block + 1.0 for block in blocks[done // SIZE :]})
    engine.scheduler.request_finished(request, blocks)


def test_a_new_engine_loads_what_the_old_one_computed() -> None:
    prefill(Engine(), list(range(10)))
    engine = Engine()
    again = Request(5, [*range(10), 99])
    assert engine.matched(again) == 8
    engine.step([RequestData(5, again.tokens, [7, 3, 9], 8, 3)], [], {9: 5.0})
    assert [float(engine.pool[block].float().mean()) for block in (7, 3, 9)] == [1.0, 2.0, 5.0]


def test_the_last_token_is_always_computed() -> None:
    prefill(Engine(), list(range(8)))
    assert Engine().matched(Request(2, list(range(8)))) == 4


def test_a_prompt_that_shares_a_block_behind_another_prefix_matches_nothing() -> None:
    prefill(Engine(), list(range(8)))
    assert Engine().matched(Request(2, [50, 51, 52, 53, 4, 5, 6, 7, 8])) == 0


def test_tenants_share_nothing() -> None:
    prefill(Engine(), list(range(8)), cache_salt_id=1)
    assert Engine().matched(Request(2, [*range(8), 9], cache_salt_id=2)) == 0
    assert Engine().matched(Request(2, [*range(8), 9], cache_salt_id=1)) == 8


def test_a_prompt_that_comes_in_chunks_and_its_output_are_saved_as_their_blocks_fill() -> None:
    engine = Engine()
    request = Request(1, list(range(6)))
    assert engine.matched(request) == 0
    engine.step([RequestData(1, list(range(6)), [0, 1], 0, 3)], [], {})
    assert Engine().matched(Request(2, [*range(6), 9])) == 0
    engine.step([], [RequestData(1, [], [], 3, 3)], {0: 1.0})
    assert Engine().matched(Request(2, [*range(6), 9])) == 4
    for position in (6, 7):
        engine.step([], [RequestData(1, [position], [], position, 1)], {1: 2.0})
    assert Engine().matched(Request(2, [*range(8), 9])) == 8


def test_an_engine_of_another_shape_finds_nothing(identity: KvIdentity, monkeypatch: pytest.MonkeyPatch) -> None:
    prefill(Engine(), list(range(8)))
    other = msgspec.structs.replace(identity, layers=[3, 3])
    monkeypatch.setenv(KV_VARIABLE, msgspec.json.encode(other).decode())
    assert Engine().matched(Request(2, [*range(8), 9])) == 0
