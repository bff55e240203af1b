"""Request bodies: what is refused, and with which field."""

import json

import pytest

from gateway import openai
from gateway.errors import ApiError
from gateway.openai import ChatBody, CompletionBody

HELLO = [{"role": "user", "content": "hello"}]


def check(body, type_, stream=False):
    """Everything that is checked before a request is admitted."""
    data = {"model": "m", "stream": stream, **body}
    data.setdefault("messages" if type_ is ChatBody else "prompt", HELLO if type_ is ChatBody else "x")
    parsed = openai.parse(json.dumps(data).encode(), type_)
    if isinstance(parsed, ChatBody):
        openai.template_messages(parsed.messages)
    else:
        openai.prompts_of(parsed.prompt, 400)
    return openai.sampling_params(
        parsed,
        max_tokens=parsed.max_tokens,
        num_prompt_tokens=10,
        max_model_len=100,
        seed=1,
        eos_token_ids=[0],
        prompt_param="messages",
    )


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
        (ChatBody, {"logprobs": True}, "logprobs"),
        (ChatBody, {"tools": [{"type": "function"}]}, "tools"),
        (ChatBody, {"response_format": {"type": "json_object"}}, "response_format"),
        (ChatBody, {"presence_penalty": 1}, "presence_penalty"),
        (ChatBody, {"logit_bias": {"5": 1}}, "logit_bias"),
        (ChatBody, {"min_tokens": 20, "max_tokens": 10}, "min_tokens"),
        (ChatBody, {"top_k": -2}, "top_k"),
        (CompletionBody, {"prompt": []}, "prompt"),
        (CompletionBody, {"prompt": [[]]}, "prompt"),
        (CompletionBody, {"prompt": ["a", 5]}, "prompt"),
        (CompletionBody, {"prompt": [True]}, "prompt"),
        (CompletionBody, {"prompt": [100_000]}, "prompt"),
        (CompletionBody, {"prompt": [[[1]]]}, "prompt"),
        (CompletionBody, {"echo": True}, "echo"),
        (CompletionBody, {"best_of": 3}, "best_of"),
        (CompletionBody, {"suffix": "x"}, "suffix"),
        (CompletionBody, {"logprobs": 0}, "logprobs"),
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


@pytest.mark.parametrize("max_tokens", [91, None])
def test_context_length(max_tokens):
    body = openai.parse(json.dumps({"model": "m", "prompt": "x", "max_tokens": max_tokens}).encode(), CompletionBody)
    with pytest.raises(ApiError) as caught:
        openai.sampling_params(
            body,
            max_tokens=max_tokens,
            num_prompt_tokens=10 if max_tokens else 100,
            max_model_len=100,
            seed=0,
            eos_token_ids=[],
            prompt_param="prompt",
        )
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")
    assert "100" in caught.value.message


def test_messages_for_the_template():
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "user", "content": "c", "name": "n"},
    ]
    body = openai.parse(json.dumps({"model": "m", "messages": messages}).encode(), ChatBody)
    assert openai.template_messages(body.messages) == [
        {"role": "system", "content": "ab"},
        {"role": "user", "content": "c", "name": "n"},
    ]


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_prompt_forms(prompt, prompts):
    assert openai.prompts_of(prompt, 10) == prompts
