"""The double against the tables of TensorRT-LLM's API: the same names, defaults and refusals, no more and no less."""

from __future__ import annotations

import dataclasses
import inspect
from enum import Enum
from pathlib import Path
from typing import Any

import pydantic
import pytest
import yaml
from tensorrt_llm import LLM, DisaggregatedParams, GuidedDecodingParams, SamplingParams
from tensorrt_llm.executor.result import CompletionOutput, RequestOutput
from tensorrt_llm.llmapi import llm_args

PYDANTIC = [
    "BaseLlmArgs",
    "TorchLlmArgs",
    "KvCacheConfig",
    "SchedulerConfig",
    "CacheTransceiverConfig",
    "TorchCompileConfig",
    "KvCacheConnectorConfig",
    "RayPlacementConfig",
    "CudaGraphConfig",
]
NOT_IN_1_2_1 = {"build_config", "enable_tqdm"}
"""In the tables of the main branch, refused by 1.2.1."""
ADDED_IN_1_2_1 = {"trace_headers", "_postproc_params"}


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


@pytest.fixture(autouse=True)
def control_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRTLLM_DOUBLE_DIR", str(tmp_path))


@pytest.fixture
def args_tables(trtllm_api: Path) -> dict[str, dict[str, Any]]:
    tables: dict[str, dict[str, Any]] = read(trtllm_api / "verified-1.2.1" / "llm_args.yaml")
    return tables


def default_of(field: pydantic.fields.FieldInfo) -> object:
    value = field.get_default(call_default_factory=True)
    return value.value if isinstance(value, Enum) else value


@pytest.mark.parametrize("name", PYDANTIC)
def test_configs_have_the_fields_and_defaults_of_the_table(args_tables: dict[str, dict[str, Any]], name: str) -> None:
    model = getattr(llm_args, name)
    table = args_tables[name]
    inherited = args_tables["BaseLlmArgs"] if name == "TorchLlmArgs" else {}
    assert set(model.model_fields) == set(table) | set(inherited)
    for field_name, facts in table.items():
        field = model.model_fields[field_name]
        assert field.is_required() == bool(facts.get("required")), field_name
        if facts.get("default") == "factory":
            assert type(default_of(field)).__name__ in facts["type"], field_name
        elif not facts.get("required"):
            assert default_of(field) == facts["default"], field_name
        assert field.alias == facts.get("alias"), field_name


def required_of(table: dict[str, Any]) -> dict[str, Any]:
    return {name: "something" for name, facts in table.items() if facts.get("required")}


@pytest.mark.parametrize("name", PYDANTIC)
def test_configs_refuse_unknown_names_and_wrong_types(args_tables: dict[str, dict[str, Any]], name: str) -> None:
    model, table = getattr(llm_args, name), args_tables[name]
    required = required_of(args_tables["BaseLlmArgs"] | table if name == "TorchLlmArgs" else table)
    with pytest.raises(pydantic.ValidationError, match="Extra inputs are not permitted"):
        model(**required, surely_unknown=1)
    for field_name, facts in table.items():
        kind = facts["type"]
        if kind.startswith(("int", "float", "bool", "Optional[int]", "Optional[float]", "Optional[Literal", "Literal")):
            with pytest.raises(pydantic.ValidationError):
                model(**required, **{field_name: "nonsense"})
        if kind in ("int", "bool", "str", "float") and not facts.get("required"):
            with pytest.raises(pydantic.ValidationError):
                model(**required, **{field_name: None})
        for value in facts.get("values", []):
            model(**required, **{field_name: value})


def test_disaggregated_params_are_those_of_the_table(args_tables: dict[str, dict[str, Any]]) -> None:
    assert_dataclass(DisaggregatedParams, args_tables["DisaggregatedParams"])


def test_sampling_params_are_those_of_the_table(trtllm_api: Path) -> None:
    tables = read(trtllm_api / "verified-1.2.1" / "sampling_params.yaml")
    assert_dataclass(SamplingParams, tables["SamplingParams"])
    assert_dataclass(GuidedDecodingParams, tables["GuidedDecodingParams"])
    assert len(tables["SamplingParams_validation"]) == len(REFUSED), "each rule has a case"


def assert_dataclass(kind: Any, table: dict[str, dict[str, Any]]) -> None:
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    assert set(fields) == set(table)
    assert all(field.kw_only for field in fields.values())
    for name, facts in table.items():
        assert fields[name].default == facts["default"], name
    with pytest.raises(TypeError):
        kind(surely_unknown=1)
    with pytest.raises(TypeError):
        kind(1)


REFUSED: list[dict[str, Any]] = [
    {"top_p": 1.5},
    {"top_k": -1},
    {"temperature": -0.1},
    {"n": 2, "best_of": 1, "temperature": 1.0},
    {"n": 2},
    {"truncate_prompt_tokens": 0},
    {"guided_decoding": GuidedDecodingParams(regex="a", grammar="b")},
]


@pytest.mark.parametrize("wrong", REFUSED, ids=lambda wrong: next(iter(wrong)))
def test_sampling_params_refuse(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - one rule each
        SamplingParams(**wrong)


@pytest.mark.parametrize(
    ("given", "is_greedy"),
    [({}, True), ({"top_k": 1}, True), ({"top_p": 0.0}, True), ({"temperature": 0}, True), ({"top_k": 2}, False)],
)
def test_greedy_rule(given: dict[str, Any], is_greedy: bool) -> None:
    assert SamplingParams(**given)._greedy_decoding is is_greedy


def both(folder: Path, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Methods with their parameters, and properties: what is promised stable and the rest."""
    methods: dict[str, Any] = {}
    properties: dict[str, Any] = {}
    for part in ("references_committed", "references"):
        table = read(folder / part / f"{name}.yaml")
        for method, facts in table["methods"].items():
            methods.setdefault(method, {}).update(facts["parameters"])
        properties |= table["properties"]
    return methods, properties


@pytest.mark.parametrize(
    ("kind", "name", "added"),
    [
        (LLM, "llm", ADDED_IN_1_2_1),
        (RequestOutput, "request_output", set()),
        (CompletionOutput, "completion_output", set()),
    ],
)
def test_methods_have_the_parameters_of_the_tables(trtllm_api: Path, kind: Any, name: str, added: set[str]) -> None:
    methods, properties = both(trtllm_api, name)
    for method, parameters in methods.items():
        own = inspect.signature(getattr(kind, method)).parameters
        if method != "__init__":
            is_open = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in own.values())
            assert is_open or set(own) - {"self"} - added == set(parameters) - added, method
        for parameter, facts in parameters.items():
            if parameter in own and "default" in facts and facts["default"] not in ("inspect._empty", [], "None"):
                assert own[parameter].default == facts["default"], f"{method}({parameter})"
    for name_of_property in properties:
        if kind is CompletionOutput:
            assert isinstance(getattr(kind, name_of_property), property)


def test_the_constructor_takes_what_the_tables_name_and_refuses_the_rest(trtllm_api: Path, tmp_path: Path) -> None:
    methods, _ = both(trtllm_api, "llm")
    explicit = set(inspect.signature(LLM).parameters) - {"kwargs"}
    taken = explicit | set(llm_args.TorchLlmArgs.model_fields)
    named = set(methods["__init__"]) - {"kwargs"}
    assert named - taken == NOT_IN_1_2_1
    for name in sorted(NOT_IN_1_2_1 | {"priority", "sleep_config", "model_kwargs", "mx_config"}):
        with pytest.raises(ValueError, match=name):
            LLM(str(tmp_path), **dict[str, Any]({name: 1}))
    with pytest.raises(pydantic.ValidationError, match="disk_cache_size"):
        llm_args.KvCacheConfig(disk_cache_size=1)  # type: ignore[call-arg] # that is the point
    with pytest.raises(TypeError, match="priority"):
        LLM.generate_async(None, [1], priority=1)  # type: ignore[call-arg,arg-type] # that is the point
