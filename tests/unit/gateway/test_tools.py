"""Tool calls: definitions, the grammar that makes calls, the parsers that read them."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from gateway import openai
from gateway.core.fold import ChoiceFold
from gateway.core.grammar import literal
from gateway.core.tools.definitions import Mode, tool_use
from gateway.core.tools.formats import FORMATS, HERMES, LLAMA3_JSON, MISTRAL, format_of
from gateway.errors import ApiError
from gateway.openai import ChatBody

NESTED = {
    "type": "object",
    "properties": {"place": {"$ref": "#/$defs/place"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["place", "days"],
    "additionalProperties": False,
    "$defs": {"place": {"type": "string", "enum": ["Rome", "Oslo"]}},
}
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "w", "parameters": NESTED, "strict": True},
}
TIME = {"type": "function", "function": {"name": "time"}}


def body(**fields):
    data = {"model": "m", "messages": [{"role": "user", "content": "x"}], **fields}
    return openai.decode(json.dumps(data).encode(), ChatBody)


def use_of(**fields):
    return tool_use(body(tools=[WEATHER, TIME], **fields))


def make_parser(form, **fields):
    return form.parser(use_of(**fields), "seed", lambda _: False)


def run(parser, pieces):
    """(content, [(name, arguments)], number of ids) of a text in pieces."""
    parsed = [parser.push(piece) for piece in pieces] + [parser.finish()]
    calls: dict[int, list[str]] = {}
    ids = set()
    for delta in (delta for part in parsed for delta in part.tool_calls):
        if delta.id is not None:
            assert delta.index == len(calls)
            ids.add(delta.id)
            calls[delta.index] = [delta.name, ""]
        calls[delta.index][1] += delta.arguments
    assert len(ids) == len(calls)
    return "".join(part.content for part in parsed), [tuple(call) for call in calls.values()]


CALL = '{"name": "weather", "arguments": {"place": "Rome", "s": "a}\\"{", "l": [{}]}}'
ARGUMENTS = '{"place": "Rome", "s": "a}\\"{", "l": [{}]}'
TEXTS = [
    (HERMES, f"<tool_call>\n{CALL}\n</tool_call>", "", [("weather", ARGUMENTS)]),
    (HERMES, f"Let me see. \n<tool_call>{CALL}</tool_call>", "Let me see.", [("weather", ARGUMENTS)]),
    (
        HERMES,
        f'<tool_call>{CALL}</tool_call>\n<tool_call>{{"name": "time", "arguments": {{}}}}</tool_call>\n',
        "",
        [("weather", ARGUMENTS), ("time", "{}")],
    ),
    (HERMES, f'<tool_call>[{CALL}, {{"name": "time"}}]</tool_call>', "", [("weather", ARGUMENTS), ("time", "{}")]),
    (HERMES, '<tool_call>{"arguments": {"a": 1}, "name": "time"}</tool_call>', "", [("time", '{"a": 1}')]),
    (HERMES, '<tool_call>{"name": "time", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("time", '{"a": 1}')]),
    (HERMES, '<tool_call>{"name": "time", "arguments": {}, "arguments": {}}</tool_call>', "", [("time", "{}")]),
    (HERMES, f'<tool_call>{{"name": "time", "arguments": {{}}, x {CALL}', "", [("time", "{}")]),
    (HERMES, '<tool_call>{"name": "other", "arguments": {}}</tool_call>', None, []),
    (HERMES, "<tool_call>no json</tool_call>", None, []),
    (HERMES, '<tool_call>{"name": "time"', None, []),
    (HERMES, "a < b, a <tool b", None, []),
    (HERMES, '{"name": "time", "arguments": {}}', None, []),
    (HERMES, "", None, []),
    (LLAMA3_JSON, '{"name": "time", "parameters": {"a": 1}}', "", [("time", '{"a": 1}')]),
    (
        LLAMA3_JSON,
        ' <|python_tag|>{"name": "time", "parameters": {}}; {"name": "weather", "parameters": {"a": 2}}',
        "",
        [("time", "{}"), ("weather", '{"a": 2}')],
    ),
    (LLAMA3_JSON, '{"place": "Rome"}', None, []),
    (LLAMA3_JSON, 'It is {"name": "time", "parameters": {}}', None, []),
    (MISTRAL, f"[TOOL_CALLS] [{CALL}, {CALL}]", "", [("weather", ARGUMENTS)] * 2),
    (MISTRAL, "[TOOL] x", None, []),
]


@pytest.mark.parametrize(("form", "text", "content", "calls"), TEXTS)
def test_calls_are_read_however_the_text_is_cut(form, text, content, calls):
    expected = (text if content is None else content, calls)
    assert run(make_parser(form), [text]) == expected
    assert run(make_parser(form), text) == expected
    for cut in range(len(text)):
        assert run(make_parser(form), [text[:cut], text[cut:]]) == expected


@given(
    st.lists(
        st.sampled_from(
            ["<tool_call>", "</tool_call>", CALL, '{"name": "time"', ', "arguments": {', "}", "]", " ", "\n", "x", "<"]
        ),
        max_size=12,
    ),
    st.data(),
)
def test_any_text_gives_the_same_in_any_pieces(parts, data):
    text = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert run(make_parser(HERMES), pieces) == run(make_parser(HERMES), [text])


def test_arguments_are_streamed():
    parser = make_parser(HERMES)
    parsed = [parser.push(char) for char in f"<tool_call>{CALL}</tool_call>"]
    pieces = [delta.arguments for part in parsed for delta in part.tool_calls if delta.arguments]
    assert len(pieces) == len(ARGUMENTS)


def test_one_call_without_parallel_calls():
    text = f"<tool_call>{CALL}</tool_call><tool_call>{CALL}</tool_call>"
    assert run(make_parser(HERMES, parallel_tool_calls=False), [text]) == ("", [("weather", ARGUMENTS)])


class Letters:
    """Token ids are code points."""

    def decode(self, ids):
        return "".join(map(chr, ids))

    def is_special(self, token_id):
        return False

    is_byte = is_special

    def whole_text(self, token_id):
        return chr(token_id)


@pytest.mark.parametrize(
    ("stops", "reason"), [([], "tool_calls"), (["Rome"], "stop"), (["</tool_call>"], "tool_calls")]
)
def test_a_call_that_a_stop_string_cuts_is_not_one_to_carry_out(stops, reason):
    fold = ChoiceFold(Letters(), stops, parser=make_parser(HERMES))
    whole = fold.push([ord(char) for char in HERMES.begin + CALL + HERMES.end], "stop")
    assert (whole.finish_reason, whole.tool_calls[0].name) == (reason, "weather")
    assert ("Rome" in whole.tool_calls[0].arguments) == (stops != ["Rome"])


def test_ids_are_a_function_of_the_seed():
    ids = [make_parser(HERMES).push(f"<tool_call>{CALL}").tool_calls[0].id for _ in range(2)]
    assert ids[0] == ids[1]
    assert len(ids[0]) >= 9
    other = HERMES.parser(use_of(), "other", lambda _: False).push(f"<tool_call>{CALL}")
    assert other.tool_calls[0].id != ids[0]


def byte_tokenizer(tmp_path):
    vocab = {char: number for number, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return LLTokenizer(str(tmp_path / "tokenizer.json"), eos_token=256)


def accepts(tokenizer, grammar, text):
    matcher = LLMatcher(tokenizer, grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    ids = tokenizer.tokenize_str(text)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


GOOD = {"name": "weather", "arguments": {"place": "Oslo", "days": 3}}
NOW = {"name": "time", "arguments": {}}


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_grammar_allows_calls_and_nothing_else(form, tmp_path):
    tokenizer = byte_tokenizer(tmp_path)
    grammar = form.grammar(use_of(tool_choice="required"), literal)
    for calls in ([GOOD], [GOOD, NOW], [NOW] * 3):
        text = form.render_calls(calls)
        assert accepts(tokenizer, grammar, text), text
        read = run(make_parser(form, tool_choice="required"), [text])
        assert read == ("", [(call["name"], json.dumps(call["arguments"])) for call in calls])
    for bad in ({**GOOD, "name": "other"}, {**GOOD, "arguments": {"place": "Paris", "days": 3}}, {"name": "weather"}):
        assert not accepts(tokenizer, grammar, form.render_calls([{"arguments": {}, **bad}]))
    assert not accepts(tokenizer, grammar, "Hello")
    named = {"type": "function", "function": {"name": "weather"}}
    grammar = form.grammar(use_of(tool_choice=named), literal)
    assert accepts(tokenizer, grammar, form.render_calls([GOOD]))
    assert not accepts(tokenizer, grammar, form.render_calls([NOW]))
    assert not accepts(tokenizer, grammar, form.render_calls([GOOD, GOOD]))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "retrieval"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [TIME, {"type": "function", "function": {}}]}, "tools[1].function.name"),
        ({"tools": [TIME, TIME]}, "tools[1].function.name"),
        (
            {"tools": [{"type": "function", "function": {"name": "a", "parameters": []}}]},
            "tools[0].function.parameters",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "array"}}}]},
            "tools[0].function.parameters",
        ),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TIME], "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": [TIME], "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tools": [TIME], "tool_choice": {"type": "function"}}, "tool_choice"),
    ],
)
def test_bad_tools_are_named(fields, param):
    with pytest.raises(ApiError) as caught:
        tool_use(body(**fields))
    assert (caught.value.status, caught.value.param) == (400, param)


def test_modes():
    assert tool_use(body()) is None
    assert tool_use(body(tool_choice="auto")) is None
    assert use_of(tool_choice="none") is None
    assert use_of().mode is Mode.AUTO
    assert use_of(tool_choice="required").mode is Mode.REQUIRED
    named = use_of(tool_choice={"type": "function", "function": {"name": "time"}})
    assert (named.mode, named.names) == (Mode.NAMED, {"time"})


@pytest.mark.parametrize(
    ("template", "form"),
    [
        (None, HERMES),
        ("{{ messages }}", HERMES),
        ("x <tool_call> y", HERMES),
        ("x <|python_tag|> y", LLAMA3_JSON),
        ("x [TOOL_CALLS] y", MISTRAL),
    ],
)
def test_family_of_a_template(template, form):
    assert format_of(template) is form


def test_preamble_shows_tools_and_form():
    text = HERMES.preamble([WEATHER, TIME])
    assert '"name": "weather"' in text
    assert "<tool_call>" in text
