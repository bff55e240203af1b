from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.backends.tensorrt_llm.cursor import Cursor


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None


@dataclass
class Output:
    """As `CompletionOutput`: one object, whose lists grow in place."""

    index: int = 0
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Any]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids_diff: list[int] = field(default_factory=lambda: [99, 99])


@given(st.lists(st.lists(st.integers(0, 9), max_size=4), max_size=8))
def test_every_token_of_a_growing_list_comes_once(steps: list[list[int]]) -> None:
    output, cursor = Output(), Cursor()
    read: list[int] = []
    for new_ids in steps:
        output.token_ids += new_ids
        news = cursor.read([output])
        read += news.ids if news is not None else []
    assert read == output.token_ids


def test_a_list_that_shrinks_at_the_end_takes_nothing_back_and_gives_nothing_twice() -> None:
    output, cursor = Output(token_ids=[1, 2, 3]), Cursor()
    first = cursor.read([output])
    del output.token_ids[1:]
    output.finish_reason, output.stop_reason = "stop", 3
    last = cursor.read([output])
    assert first is not None
    assert first.ids == [1, 2, 3]
    assert last is not None
    assert (last.ids, last.finish_reason, last.stop_id) == ([], "stop", 3)


def test_a_response_of_another_choice_brings_nothing() -> None:
    outputs = [Output(index=0, token_ids=[1]), Output(index=1, token_ids=[5])]
    cursor = Cursor(index=1)
    first = cursor.read(outputs)
    outputs[0].token_ids.append(2)
    assert first is not None
    assert first.ids == [5]
    assert cursor.read(outputs) is None


def test_the_end_is_told_once() -> None:
    output, cursor = Output(token_ids=[1], finish_reason="length"), Cursor()
    news = cursor.read([output])
    assert news is not None
    assert news.finish_reason == "length"
    assert cursor.read([output]) is None


def test_a_matched_stop_string_names_no_token() -> None:
    news = Cursor().read([Output(token_ids=[1], finish_reason="stop", stop_reason="END")])
    assert news is not None
    assert news.stop_id is None


def test_logprobs_are_those_of_the_new_tokens_though_the_list_is_longer() -> None:
    best = {7: Logprob(-0.1, 1), 8: Logprob(-2.0, 2), 9: Logprob(-3.0, 3)}
    output = Output(token_ids=[7, 9], logprobs=[best, best, best])
    news = Cursor(num_top_logprobs=2).read([output])
    assert news is not None
    assert news.logprobs is not None
    assert [(one.logprob, one.rank, one.top_ids) for one in news.logprobs] == [(-0.1, 1, [7, 8]), (-3.0, 3, [7, 8])]


@pytest.mark.parametrize("logprobs", [[], [{8: Logprob(-1.0)}]])
def test_tokens_without_their_logprobs_are_an_error(logprobs: list[dict[int, Any]]) -> None:
    with pytest.raises(ValueError, match="logprob"):
        Cursor(num_top_logprobs=0).read([Output(token_ids=[7], logprobs=logprobs)])
