"""Request bodies: what is refused, and with which field."""

import json

import pytest

from gateway import openai
from gateway.core.messages import prompts_of, template_messages
from gateway.core.sampling import ModelLimits, sampling_params
from gateway.errors import ApiError
from gateway.openai import ChatBody, CompletionBody

LIMITS = ModelLimits(max_model_len=100, vocab_size=400, eos_token_ids=[0])

HELLO = [{"role": "user", "content": "hello"}]


def check(body, type_, stream=False):
    """Everything that is checked before a request is admitted."""
    data = {"model": "m", "stream": stream, **body}
    data.setdefault("messages" if type_ is ChatBody else "prompt", HELLO if type_ is ChatBody else "x")
    parsed = openai.parse(json.dumps(data).encode(), type_)
    if isinstance(parsed, ChatBody):
        template_messages(parsed.messages)
    else:
        prompts_of(parsed.prompt, 400)
    return sampling_params(parsed, 10, LIMITS, seed=1)


@pytest.mark.parametrize(
    ("type_", "change", "param"),
    [
        (ChatBody, {"model": None}, "model"),
        (ChatBody, {"model": 5}, "model"),
        (ChatBody, {"messages": []}, "messages"),
        (ChatBody, {"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        (ChatBody, {"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        (
            ChatBody,
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0]",
        ),
        (ChatBody, {"temperature": 2.5}, "temperature"),
        (ChatBody, {"temperature": "1"}, "temperature"),
        (ChatBody, {"top_p": -0.1}, "top_p"),
        (ChatBody, {"max_tokens": 0}, "max_tokens"),
        (ChatBody, {"max_tokens": 1.5}, "max_tokens"),
        (ChatBody, {"max_tokens": True}, "max_tokens"),
        (ChatBody, {"seed": 2**70}, "seed"),
        (ChatBody, {"n": 0}, "n"),
        (ChatBody, {"stop": ""}, "stop"),
        (ChatBody, {"stop": ["a"] * 17}, "stop"),
        (ChatBody, {"stream_options": {"include_usage": True}}, "stream_options"),
        (ChatBody, {"top_logprobs": 3}, "top_logprobs"),
        (ChatBody, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (ChatBody, {"logprobs": 1}, "logprobs"),
        (ChatBody, {"tools": []}, "tools"),
        (ChatBody, {"best_of": 2}, "best_of"),
        (ChatBody, {"echo": True}, "echo"),
        (ChatBody, {"continue_final_message": True}, "continue_final_message"),
        (ChatBody, {"add_generation_prompt": False}, "add_generation_prompt"),
        (ChatBody, {"use_beam_search": True}, "use_beam_search"),
        (CompletionBody, {"use_beam_search": True}, "use_beam_search"),
        (CompletionBody, {"prompt_embeds": "x"}, "prompt_embeds"),
        (ChatBody, {"presence_penalty": 2.1}, "presence_penalty"),
        (ChatBody, {"repetition_penalty": 0}, "repetition_penalty"),
        (ChatBody, {"logit_bias": {"400": 1}}, "logit_bias"),
        (ChatBody, {"logit_bias": {"-1": 1}}, "logit_bias"),
        (ChatBody, {"logit_bias": {"x": 1}}, "logit_bias"),
        (ChatBody, {"logit_bias": {"\u0661": 1}}, "logit_bias"),
        (ChatBody, {"min_tokens": 20, "max_tokens": 10}, "min_tokens"),
        (ChatBody, {"top_k": -2}, "top_k"),
        (CompletionBody, {"prompt": []}, "prompt"),
        (CompletionBody, {"prompt": [[]]}, "prompt"),
        (CompletionBody, {"prompt": ["a", 5]}, "prompt"),
        (CompletionBody, {"prompt": [True]}, "prompt"),
        (CompletionBody, {"prompt": [100_000]}, "prompt"),
        (CompletionBody, {"prompt": [[[1]]]}, "prompt"),
        (CompletionBody, {"echo": 1}, "echo"),
        (CompletionBody, {"max_tokens": 0}, "max_tokens"),
        (CompletionBody, {"max_tokens": -1, "echo": True}, "max_tokens"),
        (CompletionBody, {"best_of": 2, "n": 3}, "best_of"),
        (CompletionBody, {"best_of": 21}, "best_of"),
        (CompletionBody, {"suffix": "x"}, "suffix"),
        (CompletionBody, {"logprobs": 21}, "logprobs"),
        (CompletionBody, {"logprobs": True}, "logprobs"),
        (CompletionBody, {"prompt_logprobs": 21}, "prompt_logprobs"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_field_is_named(type_, change, param, stream):
    with pytest.raises(ApiError) as caught:
        # Stream options are only bad without a stream.
        check(change, type_, stream and "stream_options" not in change)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert caught.value.message


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"model": "\xff"}',
        b'{"model": "\\ud83d"}',
        b'{"model": "tiny-chat", "messages": NaN}',
        b'{"model":"tiny-chat","x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
)
def test_bad_json(data):
    with pytest.raises(ApiError) as caught:
        openai.parse(data, ChatBody)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": None, "stop": None, "n": None, "logprobs": None},
        {"logprobs": False, "top_logprobs": 0, "tool_choice": "none", "modalities": ["text"]},
        {"presence_penalty": 0, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "logit_bias": {}},
        {"response_format": {"type": "text"}, "user": "u", "metadata": {"a": 1}, "never_heard_of": [{}]},
        {"echo": False, "best_of": 1, "add_generation_prompt": True, "continue_final_message": False},
        {"temperature": 0, "top_p": 1, "top_k": -1, "seed": -5, "stop": ["a", "b"]},
    ],
)
def test_neutral_fields_are_accepted(change):
    assert check(change, ChatBody).max_tokens == 90


def test_sampling_params():
    body = {
        "temperature": 0.5,
        "top_p": 0,
        "top_k": 7,
        "min_p": 0.1,
        "min_tokens": 2,
        "max_tokens": 5,
        "ignore_eos": True,
        "stop_token_ids": [3],
    }
    params = check(body, CompletionBody)
    assert (params.temperature, params.top_k, params.min_p) == (0.5, 7, 0.1)
    assert 0 < params.top_p < 1e-6
    assert (params.min_tokens, params.max_tokens, params.ignore_eos, params.stop_token_ids) == (2, 5, True, [3])
    assert check({}, ChatBody).temperature == 1.0


def test_engine_features_are_passed_on():
    body = {
        "presence_penalty": -1,
        "frequency_penalty": 0.5,
        "repetition_penalty": 1.2,
        "logit_bias": {"7": -100, "8": 2.5},
        "logprobs": True,
        "top_logprobs": 3,
        "prompt_logprobs": 1,
    }
    params = check(body, ChatBody)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (-1, 0.5, 1.2)
    assert params.logit_bias == {7: -100.0, 8: 2.5}
    assert (params.logprobs, params.prompt_logprobs) == (3, 1)
    assert check({"logprobs": True}, ChatBody).logprobs == 0
    assert check({"logprobs": False}, ChatBody).logprobs is None


@pytest.mark.parametrize(
    ("change", "logprobs", "prompt_logprobs"),
    [
        ({"logprobs": 2}, 2, None),
        ({"logprobs": 2, "echo": True}, 2, 2),
        ({"echo": True}, None, None),
        ({"echo": True, "max_tokens": 0}, None, 0),
        ({"best_of": 3}, 0, None),
        ({"best_of": 3, "n": 3}, None, None),
    ],
)
def test_logprobs_that_a_completion_needs(change, logprobs, prompt_logprobs):
    params = check(change, CompletionBody)
    assert (params.logprobs, params.prompt_logprobs) == (logprobs, prompt_logprobs)
    assert params.max_tokens == change.get("max_tokens", 16)


def test_best_of_is_not_streamed():
    with pytest.raises(ApiError) as caught:
        check({"best_of": 2}, CompletionBody, stream=True)
    assert caught.value.param == "best_of"
    with pytest.raises(ApiError) as caught:
        check({"prompt_logprobs": 0}, CompletionBody, stream=True)
    assert caught.value.param == "prompt_logprobs"


@pytest.mark.parametrize(("max_tokens", "num_prompt_tokens"), [(91, 10), (None, 100)])
def test_context_length(max_tokens, num_prompt_tokens):
    body = openai.parse(json.dumps({"model": "m", "prompt": "x", "max_tokens": max_tokens}).encode(), CompletionBody)
    with pytest.raises(ApiError) as caught:
        sampling_params(body, num_prompt_tokens, LIMITS, seed=0)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")
    assert "100" in caught.value.message


def test_messages_for_the_template():
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "user", "content": "c", "name": "n"},
    ]
    body = openai.parse(json.dumps({"model": "m", "messages": messages}).encode(), ChatBody)
    assert template_messages(body.messages) == [
        {"role": "system", "content": "ab"},
        {"role": "user", "content": "c", "name": "n"},
    ]


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_prompt_forms(prompt, prompts):
    assert prompts_of(prompt, 10) == prompts
