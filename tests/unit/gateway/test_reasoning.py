"""Thoughts are taken out of the text, however it is cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.reasoning import ThinkParser


def run(pieces, *, starts_inside=False):
    parser = ThinkParser(None, starts_inside=starts_inside, special_tokens=frozenset())
    parsed = [parser.push(piece) for piece in pieces] + [parser.finish()]
    return "".join(p.reasoning for p in parsed), "".join(p.content for p in parsed)


@pytest.mark.parametrize(
    ("text", "starts_inside", "reasoning", "content"),
    [
        ("<think>\nhm, a < b\n</think>\n\nYes.", False, "hm, a < b", "Yes."),
        (" \n<think>a b</think>c ", False, "a b", "c "),
        ("hm\n</think>\nYes.", True, "hm", "Yes."),
        ("No thoughts.", False, "", "No thoughts."),
        (" leading", False, "", " leading"),
        ("I say <think> aloud </think>", False, "", "I say <think> aloud </think>"),
        ("<think>cut off ", False, "cut off", ""),
        ("cut </thin", True, "cut </thin", ""),
        ("<thin", False, "", "<thin"),
        ("", False, "", ""),
    ],
)
def test_reasoning_and_content(text, starts_inside, reasoning, content):
    for pieces in ([text], text, *([text[:cut], text[cut:]] for cut in range(len(text)))):
        assert run(pieces, starts_inside=starts_inside) == (reasoning, content)


@given(st.lists(st.sampled_from(["<think>", "</think>", " ", "\n", "a", "<", "</"]), max_size=12), st.booleans())
def test_any_text_gives_the_same_in_any_pieces(parts, starts_inside):
    text = "".join(parts)
    assert run(parts, starts_inside=starts_inside) == run([text], starts_inside=starts_inside)
    assert run(text, starts_inside=starts_inside) == run([text], starts_inside=starts_inside)
