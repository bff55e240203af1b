"""The engine's parameters for what a client asks of one prompt. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from engine.protocol import SamplingParams
from gateway.errors import bad_request, context_length_exceeded
from gateway.openai import ChatBody, CompletionBody


class ModelLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What the served model sets."""

    max_model_len: int
    """Prompt and answer together, in tokens."""
    vocab_size: int
    eos_token_ids: list[int]


def sampling_params(
    body: ChatBody | CompletionBody,
    num_prompt_tokens: int,
    limits: ModelLimits,
    *,
    seed: int,
    grammar: str | None = None,
) -> SamplingParams:
    """Parameters for a prompt of `num_prompt_tokens`; without a wish for a length, what is left of the context.

    Raises ApiError (400): context_length_exceeded if prompt and answer do not fit, or a field that is out of range.
    """
    num_max = _max_tokens(body, num_prompt_tokens, limits.max_model_len)
    if (body.min_tokens or 0) > num_max:
        raise bad_request(f"min_tokens must not exceed max_tokens ({num_max})", "min_tokens")
    num_top, num_top_prompt = body.num_top_logprobs, body.prompt_logprobs
    if isinstance(body, CompletionBody):
        if body.echo and num_top_prompt is None and (num_top is not None or num_max == 0):
            num_top_prompt = num_top or 0
        if num_top is None and (body.best_of or 1) > body.num_samples:
            num_top = 0  # the best are chosen by the logprobs of their tokens
    return SamplingParams(
        max_tokens=num_max,
        min_tokens=body.min_tokens or 0,
        temperature=1.0 if body.temperature is None else body.temperature,
        # No probability mass at all leaves the likeliest token, and the engine wants more than nothing.
        top_p=1.0 if body.top_p is None else max(body.top_p, 1e-9),
        top_k=max(body.top_k or 0, 0),
        min_p=body.min_p or 0.0,
        seed=seed,
        seeded=body.seed is not None,
        ignore_eos=bool(body.ignore_eos),
        eos_token_ids=limits.eos_token_ids,
        stop_token_ids=_known_ids(body.stop_token_ids or [], limits.vocab_size),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=body.repetition_penalty or 1.0,
        logit_bias=_logit_bias(body.logit_bias or {}, limits.vocab_size),
        logprobs=num_top,
        prompt_logprobs=num_top_prompt,
        grammar=grammar,
    )


def _max_tokens(body: ChatBody | CompletionBody, num_prompt_tokens: int, max_model_len: int) -> int:
    wanted, room = body.wanted_tokens, max_model_len - num_prompt_tokens
    if (room < 1 and wanted != 0) or room < (wanted or 0):
        param = "messages" if isinstance(body, ChatBody) else "prompt"
        answer = f" and {wanted} for the answer" if wanted else ""
        raise context_length_exceeded(
            f"This model's context is {max_model_len} tokens; the request has {num_prompt_tokens} tokens in "
            f"the {param}{answer}.",
            param,
        )
    return room if wanted is None else wanted


def _known_ids(ids: Sequence[int], vocab_size: int) -> list[int]:
    # An id that no token has never comes: nothing to stop at.
    return [token_id for token_id in ids if token_id < vocab_size]


def _logit_bias(given: Mapping[str, float], vocab_size: int) -> dict[int, float]:
    bias: dict[int, float] = {}
    for key, value in given.items():
        if not (key.isascii() and key.isdecimal() and len(key) <= 10 and int(key) < vocab_size):
            message = f"logit_bias: {key[:40]!r} is not a token id from 0 to {vocab_size - 1}"
            raise bad_request(message, "logit_bias")
        bias[int(key)] = value
    return bias
