"""No argument is ever passed that TensorRT-LLM 1.2.1 does not know."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from engine.backends.tensorrt_llm.arguments import (
    connector_arguments,
    cuda_graph_arguments,
    kv_cache_arguments,
    llm_arguments,
    most_step_tokens,
)
from engine.backends.tensorrt_llm.sampling import draws_itself, is_greedy, needs_processor, sampling_arguments
from engine.backends.tensorrt_llm.wire import EngineSpec
from engine.protocol import SamplingParams

SPEC = EngineSpec(
    model_dir="/m",
    dtype="bfloat16",
    tensor=2,
    layers=[3, 3],
    gpus_per_node=4,
    max_batch=8,
    max_model_len=4096,
    max_num_tokens=8192,
    block_tokens=32,
    num_kv_blocks=100,
)
SPECS = [
    msgspec.structs.replace(SPEC, layers=layers, ray=ray, cuda_graphs=graphs)
    for layers, ray, graphs in itertools.product([[6], [2, 4]], [False, True], [False, True])
]
SAMPLING = [
    SamplingParams(max_tokens=8, **fields)
    for fields in (
        {},
        {"temperature": 0.0},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 40},
        {"top_p": 0.5},
        {"min_p": 0.1, "seeded": True},
        {"ignore_eos": True, "logprobs": 0},
        {"logprobs": 5, "min_tokens": 0},
        {"presence_penalty": 1.0, "frequency_penalty": 1.0, "repetition_penalty": 1.2, "logit_bias": {3: 1.0}},
        {"grammar": "start: /a/", "eos_token_ids": [2], "min_tokens": 3, "stop_token_ids": [4]},
    )
]


@pytest.fixture(scope="module")
def tables(trtllm_api: Path) -> dict[str, Any]:
    folder = trtllm_api / "verified-1.2.1"
    read: dict[str, Any] = {}
    for name in ("llm_args", "sampling_params"):
        read |= yaml.safe_load((folder / f"{name}.yaml").read_text())
    return read


@pytest.mark.parametrize("spec", SPECS)
def test_every_constructor_argument_is_in_the_tables(tables: dict[str, Any], spec: EngineSpec) -> None:
    known = tables["BaseLlmArgs"].keys() | tables["TorchLlmArgs"].keys()
    assert llm_arguments(spec).keys() <= known
    assert {"kv_cache_config", "cuda_graph_config", "checkpoint_loader", "kv_connector_config"} <= known
    assert kv_cache_arguments(spec).keys() <= tables["KvCacheConfig"].keys()
    assert (cuda_graph_arguments(spec) or {}).keys() <= tables["CudaGraphConfig"].keys()
    assert connector_arguments().keys() == tables["KvCacheConnectorConfig"].keys()


@pytest.mark.parametrize("sampling", SAMPLING)
def test_every_sampling_argument_is_in_the_tables(tables: dict[str, Any], sampling: SamplingParams) -> None:
    assert sampling_arguments(sampling, 8, 1).keys() | {"logits_processor"} <= tables["SamplingParams"].keys()


@pytest.mark.parametrize("sampling", SAMPLING)
def test_no_request_depends_on_the_defaults_that_surprise(sampling: SamplingParams) -> None:
    arguments = sampling_arguments(sampling, 5, 1)
    assert arguments["max_tokens"] == 5
    assert arguments["temperature"] > 0
    assert arguments["detokenize"] is False
    greedy = arguments.get("top_k") == 1
    assert greedy == (is_greedy(sampling) or draws_itself(sampling))
    assert arguments.get("logprobs", 1) != 0
    unwanted = {"end_id", "stop", "stop_token_ids", "n", "guided_decoding", "min_tokens", "presence_penalty"}
    assert not unwanted & arguments.keys()


def test_what_a_resume_would_get_wrong_has_a_processor() -> None:
    assert [needs_processor(sampling) for sampling in SAMPLING] == [
        False, False, False, False, True, False, False, True, True,
    ]  # fmt: skip


@pytest.mark.parametrize(("max_model_len", "expected"), [(512, 8192), (12_000, 12_000), (131_072, 16_384)])
def test_a_resumed_prompt_fits_into_an_iteration_up_to_a_limit(max_model_len: int, expected: int) -> None:
    assert most_step_tokens(max_model_len, 8) == expected
    arguments = llm_arguments(SPEC)
    assert arguments["enable_chunked_prefill"] is True
    assert arguments["max_seq_len"] == SPEC.max_model_len


def test_stages_of_unequal_length_are_told() -> None:
    assert llm_arguments(msgspec.structs.replace(SPEC, layers=[2, 4]))["pp_partition"] == [2, 4]
    assert "pp_partition" not in llm_arguments(msgspec.structs.replace(SPEC, layers=[6]))
