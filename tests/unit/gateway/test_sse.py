import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.sse import event

SEPARATORS = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"


@given(text=st.text() | st.text(alphabet=SEPARATORS + "a"))
def test_event_is_one_line_however_lines_are_split(text):
    framed = event({"text": text})
    assert framed.endswith(b"\n\n")
    line, empty = framed.decode().splitlines()
    assert empty == ""
    assert json.loads(line.removeprefix("data: ")) == {"text": text}


@pytest.mark.parametrize("separator", SEPARATORS)
def test_each_line_separator_is_escaped(separator):
    assert separator not in event({"text": separator}).decode().removesuffix("\n\n")
