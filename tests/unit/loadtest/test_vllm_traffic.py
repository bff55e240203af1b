"""The strict reader of `vllm bench serve`: what it takes, and what it fails on."""

import itertools
import json
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest import vllm_traffic

CHUNKS = [
    {"choices": [{"text": "é"}]},
    {"choices": [{"text": "b"}]},
    {"choices": [], "usage": {"completion_tokens": 2}},
]
STREAM = b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in CHUNKS) + b"data: [DONE]\n\n"


async def read(data: bytes, *cuts: int) -> list[object]:
    async def parts() -> AsyncIterator[bytes]:
        places = [0, *sorted(cuts), len(data)]
        for start, end in itertools.pairwise(places):
            yield data[start:end]

    return [event async for event in vllm_traffic._events(parts())]


@given(st.lists(st.integers(0, len(STREAM)), max_size=6))
async def test_events_wherever_the_stream_is_cut(cuts: list[int]) -> None:
    assert await read(STREAM, *cuts) == CHUNKS


async def test_comments_are_no_events() -> None:
    assert await read(b": still here\n\n" + STREAM) == CHUNKS


@pytest.mark.parametrize(
    "stream",
    [STREAM.replace(b"data: ", b"data:"), STREAM.replace(b"data: ", b"event: x\ndata: "), STREAM[:-20], b""],
    ids=["no space", "event line", "cut", "empty"],
)
async def test_what_it_cannot_read(stream: bytes) -> None:
    with pytest.raises(ValueError, match=r"DONE|Expecting"):
        await read(stream)


def test_a_stream_that_ends_early_is_no_success() -> None:
    batch = vllm_traffic.shapes("m", "text", [1, 2, 3], 4)[2]
    assert vllm_traffic._shortfall(batch, 8, 0.1) == ""
    assert vllm_traffic._shortfall(batch, 7, 0.1) == "7 tokens instead of 8"
    assert vllm_traffic._shortfall(batch, 8, None) == "no token came"
