import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.protocol import COMPRESS_FROM_BYTES, InstanceLost, packed, unpacked


def message(reason):
    return msgspec.msgpack.encode(InstanceLost(instance="i1", reason=reason))


@given(st.text(max_size=50), st.integers(0, 2 * COMPRESS_FROM_BYTES))
def test_messages_of_any_size_come_back(text, num_more):
    payload = message(text + "x" * num_more)
    sent = packed(payload)
    assert unpacked(sent) == payload
    assert (sent == payload) == (len(payload) < COMPRESS_FROM_BYTES), "small ones stay readable"


def test_large_messages_become_small():
    assert len(packed(message("rank " * COMPRESS_FROM_BYTES))) < COMPRESS_FROM_BYTES / 10


def test_damaged_data_are_malformed_like_any_other_message():
    sent = packed(message("x" * COMPRESS_FROM_BYTES))
    with pytest.raises(msgspec.DecodeError, match="damaged"):
        unpacked(sent[:-3])
