"""`tools` and `tool_choice` of a request, checked. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any, Final

import msgspec

from gateway.core.grammar import check_size, is_name, json_lark, rooted
from gateway.errors import bad_request
from gateway.openai import ChatBody

MAX_CALLS: Final = 16
"""Parallel calls of one answer, where a grammar counts them."""
_NO_PARAMETERS: Final[Mapping[str, Any]] = {"type": "object", "properties": {}, "additionalProperties": False}


class Mode(StrEnum):
    AUTO = "auto"
    """The model decides."""
    REQUIRED = "required"
    """At least one call, of any tool."""
    NAMED = "named"
    """Exactly one call of the one tool."""


class Tool(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    parameters: Mapping[str, Any]
    strict: bool


class ToolUse(msgspec.Struct, frozen=True, kw_only=True):
    """What an answer may call, and must."""

    tools: Sequence[Tool]
    """Those that may be called."""
    mode: Mode
    parallel: bool
    """More than one call."""

    @property
    def names(self) -> frozenset[str]:
        return frozenset(tool.name for tool in self.tools)

    @property
    def max_calls(self) -> int:
        return MAX_CALLS if self.parallel and self.mode is not Mode.NAMED else 1

    def call_lark(self, arguments_key: str) -> str:
        """One call as a JSON object of `name` and `arguments_key`, in this order, as an expression of Lark."""
        calls = [_call_schema(number, tool.name, arguments_key) for number, tool in enumerate(self.tools)]
        definitions = {
            f"tool{number}": rooted(tool.parameters, f"#/$defs/tool{number}") for number, tool in enumerate(self.tools)
        }
        schema = {**(calls[0] if len(calls) == 1 else {"anyOf": calls}), "$defs": definitions}
        return json_lark(schema, lenient=not all(tool.strict for tool in self.tools))


def tool_use(body: ChatBody) -> ToolUse | None:
    """What `body` asks for; None if no call may be made. Raises ApiError (400) naming the field."""
    tools = [_tool(given, f"tools[{index}]") for index, given in enumerate(body.tools or [])]
    names = [tool.name for tool in tools]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise bad_request(
                f"tools[{index}].function.name: {name!r} is defined twice", f"tools[{index}].function.name"
            )
    mode, wanted = _mode(body.tool_choice, names)
    if mode is None or not tools:
        return None
    chosen = [tool for tool in tools if wanted in (None, tool.name)]
    return ToolUse(tools=chosen, mode=mode, parallel=body.parallel_tool_calls is not False)


def _mode(choice: str | Mapping[str, Any] | None, names: Sequence[str]) -> tuple[Mode | None, str | None]:
    """(None, ...) where no call may be made; the name of the tool that must be called."""
    if choice is None or choice == "auto":
        return Mode.AUTO, None
    if choice == "none":
        return None, None
    if not names:
        raise bad_request("tool_choice needs tools", "tool_choice")
    if choice == "required":
        return Mode.REQUIRED, None
    function = choice.get("function") if isinstance(choice, Mapping) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        message = 'tool_choice must be none, auto, required or {"type": "function", "function": {"name": string}}'
        raise bad_request(message, "tool_choice")
    if name not in names:
        raise bad_request(f"tool_choice: there is no tool {name[:64]!r}", "tool_choice")
    return Mode.NAMED, name


def _tool(given: Mapping[str, Any], at: str) -> Tool:
    if given.get("type") != "function":
        raise bad_request(f"{at}.type must be function", f"{at}.type")
    function = given.get("function")
    if not isinstance(function, dict):
        raise bad_request(f"{at}.function must be an object", f"{at}.function")
    name, parameters, strict = function.get("name"), function.get("parameters"), function.get("strict")
    if not isinstance(name, str) or not is_name(name):
        message = f"{at}.function.name must have 1 to 64 letters, digits, _ or -"
        raise bad_request(message, f"{at}.function.name")
    if not isinstance(function.get("description"), str | None):
        raise bad_request(f"{at}.function.description must be a string", f"{at}.function.description")
    if not isinstance(parameters, dict | None):
        raise bad_request(f"{at}.function.parameters must be a JSON schema", f"{at}.function.parameters")
    if not isinstance(strict, bool | None):
        raise bad_request(f"{at}.function.strict must be true or false", f"{at}.function.strict")
    if parameters is None or parameters == {}:
        return Tool(name=name, parameters=_NO_PARAMETERS, strict=bool(strict))
    if parameters.get("type", "object") != "object":
        message = f"{at}.function.parameters must describe an object"
        raise bad_request(message, f"{at}.function.parameters")
    check_size(parameters, f"{at}.function.parameters")
    return Tool(name=name, parameters={"type": "object", **parameters}, strict=bool(strict))


def _call_schema(number: int, name: str, arguments_key: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": {"const": name}, arguments_key: {"$ref": f"#/$defs/tool{number}"}},
        "required": ["name", arguments_key],
        "additionalProperties": False,
    }


def arguments_value(text: str) -> Any:
    """Arguments of a call in a conversation as chat templates want them: an object where the text is one."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text
