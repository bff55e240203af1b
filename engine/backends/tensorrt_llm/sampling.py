"""Which arguments a request becomes, and which part of it is ours to do in a logits processor.

What TensorRT-LLM would count over prompt and output alike after a resume (penalties), begin anew (grammars), or is
said to ignore (min_tokens), and the draws of a client's own seed, are done by `logits.RequestLogits`, from the
committed ids.
"""

from __future__ import annotations

from typing import Any, Final

from engine.protocol import SamplingParams

GREEDY_BELOW: Final = 1e-5


def is_greedy(sampling: SamplingParams) -> bool:
    """Whether the likeliest token is always chosen."""
    return sampling.temperature < GREEDY_BELOW


def draws_itself(sampling: SamplingParams) -> bool:
    """Whether the token is drawn by us: the client must get the same tokens again, or the engine lacks the filter."""
    return not is_greedy(sampling) and (sampling.seeded or sampling.min_p > 0)


def needs_processor(sampling: SamplingParams) -> bool:
    """Whether the engine's own choice from its own logits would not do."""
    return (
        draws_itself(sampling)
        or sampling.grammar is not None
        or sampling.min_tokens > 0
        or bool(sampling.logit_bias)
        or bool(sampling.presence_penalty or sampling.frequency_penalty)
        or sampling.repetition_penalty != 1.0
    )


def unsupported(sampling: SamplingParams) -> str | None:
    """What this engine cannot do of a request, led by the name of the field; None if nothing."""
    if sampling.prompt_logprobs is not None:
        return "sampling.prompt_logprobs: the TensorRT-LLM engine does not offer them"
    if sampling.logprobs is not None and needs_processor(sampling):
        return (
            "sampling.logprobs: the TensorRT-LLM engine gives them only without seed, min_p, grammar, min_tokens, "
            "logit_bias and penalties: its logprobs would be those of the changed distribution"
        )
    return None


def sampling_arguments(sampling: SamplingParams, max_tokens: int, seed: int) -> dict[str, Any]:
    """Arguments of TensorRT-LLM's `SamplingParams`, the logits processor apart; a new object is made of them each time.

    Never `end_id` (its EOS ids of the generation config would not be added), nor stop words (they take tokens back).
    """
    arguments: dict[str, Any] = {"max_tokens": max_tokens, "detokenize": False, "temperature": 1.0}
    if is_greedy(sampling) or draws_itself(sampling):
        arguments["top_k"] = 1  # What we have drawn is the only token left.
    else:
        arguments |= {"temperature": sampling.temperature, "seed": seed}
        if sampling.top_k:
            arguments["top_k"] = sampling.top_k
        if sampling.top_p < 1.0:
            arguments["top_p"] = sampling.top_p
        elif not sampling.top_k:
            arguments["top_k"] = 0  # All tokens, said so that it is not taken for greedy.
    if sampling.ignore_eos:
        arguments["ignore_eos"] = True
    if sampling.logprobs is not None:
        arguments["logprobs"] = max(1, sampling.logprobs)  # 0 is taken for off.
    return arguments
