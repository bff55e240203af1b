"""What an answer must look like, as a grammar for llguidance (its Lark dialect). Pure.

JSON between tokens may have a little white space, so that models write it as they are used to, but never without
bound: endless white space is how constrained models run away.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec
from llguidance import LLMatcher
from llguidance.gbnf_to_lark import any_to_lark

from gateway.errors import bad_request
from gateway.openai import GenerationBody

MAX_SCHEMA_BYTES: Final = 64 * 1024
MAX_CHOICES: Final = 4096
WHITE_SPACE: Final = r"[ \t\n]{0,16}"
_START_RULE: Final = re.compile(r"^start\s*:", re.MULTILINE)
_ANY_OBJECT: Final[Mapping[str, Any]] = {"type": "object"}


class Grammar(msgspec.Struct, frozen=True):
    """`text` for llguidance, and the field that asked for it."""

    text: str
    param: str


def body_grammar(body: GenerationBody) -> Grammar | None:
    """The grammar of response_format or guided_*; None where the text is free.

    Raises ApiError (400) naming the field. Whether it can be compiled is for the caller to find out.
    """
    found = [
        grammar
        for grammar in (
            _of_response_format(body.response_format),
            _of_guided_json(body.guided_json),
            _of_regex(body.guided_regex),
            _of_choice(body.guided_choice),
            _of_grammar(body.guided_grammar),
        )
        if grammar is not None
    ]
    if len(found) > 1:
        names = ", ".join(grammar.param for grammar in found)
        raise bad_request(f"only one of {names} can be given", found[1].param)
    return found[0] if found else None


def json_lark(schema: Mapping[str, Any] | bool, *, lenient: bool) -> str:
    """A schema as an expression of a Lark rule; `lenient`: keywords that cannot be enforced are left out of account."""
    options = {"whitespace_pattern": WHITE_SPACE, "lenient": lenient}
    whole = {} if schema is True else {"not": {}} if schema is False else dict(schema)
    return "%json " + literal({**whole, "x-guidance": options})


def literal(value: Any) -> str:
    """`value` as Lark writes it: strings, and JSON after %json."""
    # The lexer refuses this one control character, which JSON leaves as it is.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def after_reasoning(grammar: str, end: str) -> str:
    """The same after free text that ends with `end`: for prompts that begin a thought."""
    return "\n".join(
        [
            "start: free_thought free_space whole_answer",
            f"free_thought[suffix={literal(end)}]: /(.|\\n)*/",
            "free_space: /[ \\n]{0,4}/",
            renamed_start(grammar, "whole_answer"),
        ]
    )


def renamed_start(grammar: str, name: str) -> str:
    """The same grammar with another name of its start rule, for use inside another one."""
    return _START_RULE.sub(f"{name}:", grammar, count=1)


def rooted(schema: Mapping[str, Any], root: str) -> dict[str, Any]:
    """`schema` with its own references (`#/...`) made to start at `root`, for use inside another schema."""

    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [moved(item) for item in value]
        if not isinstance(value, dict):
            return value
        return {
            key: root + item[1:] if key == "$ref" and isinstance(item, str) and item.startswith("#") else moved(item)
            for key, item in value.items()
        }

    result: dict[str, Any] = moved(schema)
    return result


def _of_response_format(given: Mapping[str, Any] | None) -> Grammar | None:
    kind = (given or {}).get("type", "text" if given is None else None)
    match kind:
        case "text":
            return None
        case "json_object":
            return Grammar("start: " + json_lark(_ANY_OBJECT, lenient=False), "response_format")
        case "json_schema":
            assert given is not None, "it has a type"
            return _of_json_schema(given.get("json_schema"))
        case _:
            raise bad_request("response_format.type must be text, json_object or json_schema", "response_format")


def _of_json_schema(given: Any) -> Grammar:
    param = "response_format"
    if not isinstance(given, dict):
        raise bad_request("response_format.json_schema must be an object", param)
    name, schema, strict = given.get("name"), given.get("schema"), given.get("strict")
    if not isinstance(name, str) or not is_name(name):
        raise bad_request("response_format.json_schema.name must have 1 to 64 letters, digits, _ or -", param)
    if not isinstance(schema, dict):
        raise bad_request("response_format.json_schema.schema must be an object", param)
    if strict is not None and not isinstance(strict, bool):
        raise bad_request("response_format.json_schema.strict must be true or false", param)
    check_size(schema, param)
    return Grammar("start: " + json_lark(schema, lenient=not strict), param)


def _of_guided_json(given: Mapping[str, Any] | bool | str | None) -> Grammar | None:
    if given is None:
        return None
    schema: Any = given
    if isinstance(given, str):
        try:
            schema = json.loads(given)
        except ValueError as error:
            raise bad_request(f"guided_json is not JSON: {error}"[:300], "guided_json") from error
    if not isinstance(schema, dict | bool):
        raise bad_request("guided_json must be a JSON schema", "guided_json")
    check_size(schema, "guided_json")
    return Grammar("start: " + json_lark(schema, lenient=True), "guided_json")


def _of_regex(given: str | None) -> Grammar | None:
    if given is None:
        return None
    check_size(given, "guided_regex")
    whole = json.loads(LLMatcher.grammar_from_regex(given))
    return Grammar(whole["grammars"][0]["lark_grammar"], "guided_regex")


def _of_choice(given: Sequence[str] | None) -> Grammar | None:
    if given is None:
        return None
    if not 1 <= len(given) <= MAX_CHOICES or not all(given):
        raise bad_request(f"guided_choice must have 1 to {MAX_CHOICES} strings, none of them empty", "guided_choice")
    return Grammar("start: " + " | ".join(map(literal, given)), "guided_choice")


def _of_grammar(given: str | None) -> Grammar | None:
    if given is None:
        return None
    check_size(given, "guided_grammar")
    try:
        return Grammar(any_to_lark(given), "guided_grammar")
    except Exception as error:  # the converter raises plain Exception
        raise bad_request(f"guided_grammar cannot be read: {error}"[:300], "guided_grammar") from error


def check_size(value: Any, param: str) -> None:
    """Raises ApiError (400) if `value` is too large to compile."""
    num_bytes = len(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
    if num_bytes > MAX_SCHEMA_BYTES:
        raise bad_request(f"{param} has {num_bytes} bytes; {MAX_SCHEMA_BYTES} is the limit", param)


def is_name(text: str) -> bool:
    """Whether OpenAI takes it for the name of a schema or function."""
    return 0 < len(text) <= 64 and text.isascii() and text.replace("_", "a").replace("-", "a").isalnum()
