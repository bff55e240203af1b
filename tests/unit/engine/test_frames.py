from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from engine.core.frames import MAX_VALUES, in_frames, shortened
from engine.protocol import FinishReason, TokenEntry, TokenLogprobs

NATS_LIMIT_BYTES = 1 << 20


def entry(num_tokens: int, num_top: int | None, num_scored: int = 0, scored_top: int = 0) -> TokenEntry:
    def one(number: int) -> TokenLogprobs:
        return TokenLogprobs(-12.3456789, 151_000, [151_000] * number, [-12.3456789] * number)

    return TokenEntry(
        request_id="r" * 40,
        choice=0,
        attempt=0,
        index=0,
        ids=[151_000] * num_tokens,
        finish=FinishReason.LENGTH,
        logprobs=None if num_top is None else [one(num_top)] * num_tokens,
        prompt_logprobs=[None] + [one(scored_top)] * num_scored if num_scored else None,
    )


entries = st.builds(
    entry,
    st.integers(1, 300),
    st.none() | st.integers(0, 100),
    st.integers(0, 400),
    st.sampled_from([0, 100]),
)


@given(st.lists(entries, max_size=12))
def test_frames_keep_the_order_and_fit_into_a_message(log):
    frames = in_frames(log)
    assert [one for frame in frames for one in frame] == log
    assert all(frames)
    for frame in frames:
        assert len(msgspec.msgpack.encode(frame)) < NATS_LIMIT_BYTES or len(frame) == 1


def test_an_entry_at_the_limits_of_a_request_fits_into_a_message():
    for scored_top in (0, 5, 100):
        num_scored = MAX_VALUES // (1 + scored_top)
        assert len(msgspec.msgpack.encode(entry(1, 100, num_scored, scored_top))) < NATS_LIMIT_BYTES


def test_a_log_that_is_too_long_for_a_message_is_cut_and_says_nothing_of_its_end():
    assert shortened(entry(5000, 0)) == entry(5000, 0)
    assert shortened(entry(100_000, None)) == entry(100_000, None)
    cut = shortened(entry(5000, 20))
    assert cut.finish is None
    assert len(cut.ids) == len(cut.logprobs or []) == MAX_VALUES // 22
    assert len(msgspec.msgpack.encode(cut)) < NATS_LIMIT_BYTES
    assert len(shortened(entry(3, 100, MAX_VALUES, 0)).ids) == 1
