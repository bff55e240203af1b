"""What clients ask of the text, as grammars that llguidance compiles."""

import json

import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from gateway import openai
from gateway.core.grammar import after_reasoning, body_grammar, literal
from gateway.core.tools.definitions import tool_use
from gateway.core.tools.formats import HERMES, either
from gateway.errors import ApiError
from gateway.openai import ChatBody


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    vocab = {char: number for number, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return LLTokenizer(str(path), eos_token=256)


def body(**fields):
    data = {"model": "m", "messages": [{"role": "user", "content": "x"}], **fields}
    return openai.decode(json.dumps(data).encode(), ChatBody)


def grammar_of(**fields):
    found = body_grammar(body(**fields))
    assert found is not None
    return found


def use_of(**fields):
    found = tool_use(body(**fields))
    assert found is not None
    return found


def choice_of(*args):
    found = either(*args)
    assert found is not None
    return found.text


def accepts(tokenizer, grammar, text):
    matcher = LLMatcher(tokenizer, grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    ids = tokenizer.tokenize_str(text)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 2},
        "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
    "$defs": {
        "node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}, "additionalProperties": False}
    },
}


def schema_format(schema, **fields):
    return {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, **fields}}


@pytest.mark.parametrize(
    ("fields", "good", "bad"),
    [
        (
            {"response_format": {"type": "json_object"}},
            ["{}", '{"a": [1, 2.5e3, "\u00e9\\n", null]}', '{\n  "a": true\n}'],
            ["[]", "1", "{", '{"a":' + " " * 50 + "1}", "{} x"],
        ),
        (
            {"response_format": schema_format(PERSON, strict=True)},
            ['{"name": "Zo\u00eb", "age": 7}', '{"name":"Al","age":120,"tags":["a","b"],"next":{"next":{}}}'],
            ['{"name": "", "age": 7}', '{"name": "Al", "age": 121}', '{"name": "Al", "age": 1, "x": 1}', '{"age": 1}'],
        ),
        ({"guided_json": PERSON}, ['{"name": "Al", "age": 1}'], ["{}"]),
        ({"guided_json": json.dumps(PERSON)}, ['{"name": "Al", "age": 1}'], ["{}"]),
        ({"guided_regex": r"\d{3}/[a-c]+"}, ["123/abc"], ["12/abc", "123/abcd"]),
        ({"guided_choice": ["yes", 'n"o', "n\u00f6"]}, ["yes", 'n"o', "n\u00f6"], ["ye", "yesno", "no"]),
        ({"guided_choice": ["a\x7f\\", "\x01\n"]}, ["a\x7f\\", "\x01\n"], ["a", "a\\u007f"]),
        ({"guided_json": {"const": "\x7f"}}, ['"\\u007F"', '"\\u007f"'], ['"x"']),
        ({"guided_grammar": 'root ::= "a" ("b" | "c")+'}, ["abcb"], ["a", "b"]),
        ({"guided_grammar": 'start: "a" x\nx: "b"'}, ["ab"], ["a"]),
    ],
)
def test_grammars(tokenizer, fields, good, bad):
    grammar = grammar_of(**fields)
    assert grammar.param == next(iter(fields))
    for text in good:
        assert accepts(tokenizer, grammar.text, text), text
        assert accepts(tokenizer, after_reasoning(grammar.text, "</think>"), f"so: {{</think>\n{text}"), text
    for text in bad:
        assert not accepts(tokenizer, grammar.text, text), text


def test_free_text_has_no_grammar():
    assert body_grammar(body()) is None
    assert body_grammar(body(response_format={"type": "text"})) is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {}}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": schema_format(None)}, "response_format"),
        ({"response_format": schema_format({}, name="a b")}, "response_format"),
        ({"response_format": schema_format({}, strict=1)}, "response_format"),
        ({"response_format": schema_format({"description": "x" * 70_000})}, "response_format"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": "1"}, "guided_json"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": ["a", ""]}, "guided_choice"),
        ({"guided_grammar": "root ::= ("}, "guided_grammar"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
    ],
)
def test_bad_wishes_are_named(fields, param):
    with pytest.raises(ApiError) as caught:
        body_grammar(body(**fields))
    assert (caught.value.status, caught.value.param) == (400, param)


def test_keywords_that_cannot_be_enforced(tokenizer):
    unique = {"type": "object", "properties": {"l": {"type": "array", "uniqueItems": True}}}
    strict = grammar_of(response_format=schema_format(unique, strict=True))
    assert "uniqueItems" in LLMatcher(tokenizer, strict.text, log_level=0).get_error()
    lenient = grammar_of(response_format=schema_format(unique))
    assert accepts(tokenizer, lenient.text, '{"l": [1, 1]}')


def test_content_or_calls(tokenizer):
    tools = [{"type": "function", "function": {"name": "time"}}]
    use = use_of(tools=tools)
    content = grammar_of(response_format=schema_format(PERSON))
    grammar = choice_of(use, HERMES, literal, content)
    assert accepts(tokenizer, grammar, '{"name": "Al", "age": 1}')
    assert accepts(tokenizer, grammar, HERMES.render_calls([{"name": "time", "arguments": {}}]))
    assert not accepts(tokenizer, grammar, "words")
    assert either(use, HERMES, literal, None) is None
    must = use_of(tools=tools, tool_choice="required")
    assert not accepts(tokenizer, choice_of(must, HERMES, literal, content), '{"name": "Al", "age": 1}')
