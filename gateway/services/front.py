"""What the route handlers share: the model's names and limits, and the way from a checked body to an answer."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
from opentelemetry.trace import Tracer

from engine.protocol import SamplingParams
from gateway.core.response_format import ChatFormat, CompletionFormat
from gateway.errors import bad_request, model_not_found
from gateway.openai import MAX_CHOICES, GenerationBody, sampling_params
from gateway.services.answer import Answer
from gateway.services.dispatcher import ChoiceSpec, Dispatcher
from gateway.services.tokenizer import TextTokenizer
from gateway.settings import Settings
from gateway.telemetry import RequestTrace


class Endpoint(msgspec.Struct, frozen=True):
    """In what the two generating endpoints differ."""

    operation: str
    id_prefix: str
    prompt_param: str
    format_class: type[ChatFormat] | type[CompletionFormat]


CHAT = Endpoint("chat", "chatcmpl-", "messages", ChatFormat)
COMPLETION = Endpoint("text_completion", "cmpl-", "prompt", CompletionFormat)


class Front:
    """One model as clients see it."""

    def __init__(self, settings: Settings, tokenizer: TextTokenizer, dispatcher: Dispatcher, tracer: Tracer) -> None:
        self.settings = settings
        self.tokenizer = tokenizer
        self.dispatcher = dispatcher
        self._tracer = tracer
        self.model_name = settings.served_model_name or Path(settings.model_dir).resolve().name
        self.started_s = int(time.time())

    @property
    def max_model_len(self) -> int:
        """Prompt and answer together, in tokens: the least of what settings, plan and model say."""
        plan = self.dispatcher.router.plan
        limits = [self.settings.max_model_len, plan.model.max_model_len if plan is not None else 0]
        known = [limit for limit in limits if limit] or [self.tokenizer.max_model_len or 2048]
        return min(known)

    def check_model(self, model: str) -> None:
        """Raises ApiError (404) unless `model` is the one served."""
        if model != self.model_name:
            raise model_not_found(model)

    def start(
        self,
        endpoint: Endpoint,
        body: GenerationBody,
        prompts: Sequence[list[int]],
        max_tokens: int | None,
        headers: Mapping[str, str],
    ) -> Answer:
        """Check the lengths and admit the request: `prompts` times n choices, prompt by prompt.

        Raises ApiError: 400, 429, 503.
        """
        num_samples = body.num_samples
        if len(prompts) * num_samples > MAX_CHOICES:
            raise bad_request(f"n times the number of prompts must not exceed {MAX_CHOICES}", "n")
        seed = secrets.randbits(63) if body.seed is None else body.seed
        specs = [
            ChoiceSpec(choice, prompt, self._sampling(endpoint, body, prompt, max_tokens, seed))
            for prompt in prompts
            for choice in range(num_samples)
        ]
        response_id = endpoint.id_prefix + secrets.token_hex(12)
        trace = RequestTrace(self._tracer, endpoint.operation, body.model, headers)
        num_prompt_tokens = sum(map(len, prompts))
        try:
            generation = self.dispatcher.generate(response_id, specs, trace)
        except Exception as error:
            trace.end(prompt_tokens=num_prompt_tokens, completion_tokens=0, error=str(error))
            raise
        response_format = endpoint.format_class(
            response_id,
            int(time.time()),
            body.model,
            [spec.prompt_ids for spec in specs],
            with_token_ids=bool(body.return_token_ids),
        )
        return Answer(
            self.dispatcher,
            generation,
            response_format,
            self.tokenizer,
            body.stops,
            num_prompt_tokens,
            trace,
        )

    def _sampling(
        self, endpoint: Endpoint, body: GenerationBody, prompt: list[int], max_tokens: int | None, seed: int
    ) -> SamplingParams:
        return sampling_params(
            body,
            max_tokens=max_tokens,
            num_prompt_tokens=len(prompt),
            max_model_len=self.max_model_len,
            seed=seed,
            eos_token_ids=self.tokenizer.eos_token_ids,
            prompt_param=endpoint.prompt_param,
        )
