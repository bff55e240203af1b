"""What the route handlers share: the model's names and limits, and the way from a checked body to an answer."""

from __future__ import annotations

import hashlib
import importlib.metadata
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from opentelemetry.trace import Tracer

from gateway.core.fold import ChoiceFold
from gateway.core.messages import template_messages, without_tools
from gateway.core.parsing import OutputParser
from gateway.core.response_format import ChatFormat, CompletionFormat, Extras, Header
from gateway.core.sampling import ModelLimits, sampling_params
from gateway.errors import TemplateRefused, bad_request, model_not_found
from gateway.openai import MAX_CHOICES, ChatBody, ChatMessage, CompletionBody, GenerationBody
from gateway.services.answer import Answer
from gateway.services.caller import current_caller
from gateway.services.dispatcher import ChoiceSpec, Dispatcher
from gateway.services.structure import Structure
from gateway.services.tokenizer import TextTokenizer
from gateway.settings import Settings
from gateway.telemetry import RequestTrace


class Endpoint(msgspec.Struct, frozen=True):
    """In what the two generating endpoints differ."""

    operation: str
    id_prefix: str
    format_class: type[ChatFormat] | type[CompletionFormat]


CHAT = Endpoint("chat", "chatcmpl-", ChatFormat)
RESPONSE = Endpoint("chat", "resp_", ChatFormat)
COMPLETION = Endpoint("text_completion", "cmpl-", CompletionFormat)


class Prompt(msgspec.Struct, frozen=True):
    ids: list[int]
    text: str
    """As the client sent it; of ids, what they say."""


def no_parser(_response_id: str, _index: int) -> OutputParser | None:
    """The text is the message as it is."""
    return None


class Front:
    """One model as clients see it."""

    def __init__(self, settings: Settings, tokenizer: TextTokenizer, dispatcher: Dispatcher, tracer: Tracer) -> None:
        self.settings = settings
        self.tokenizer = tokenizer
        self.dispatcher = dispatcher
        self._tracer = tracer
        self.model_name = settings.model_name
        self.structure = Structure.of(tokenizer, Path(settings.model_dir), settings.tool_format, settings.reasoning)
        self.started_s = int(time.time())
        self.fingerprint = _fingerprint(self.model_name, Path(settings.model_dir))

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

    @property
    def limits(self) -> ModelLimits:
        return ModelLimits(
            max_model_len=self.max_model_len,
            vocab_size=self.tokenizer.vocab_size,
            eos_token_ids=self.tokenizer.eos_token_ids,
        )

    def chat_prompt(self, body: ChatBody) -> Prompt:
        """The prompt of a conversation. Raises ApiError (400)."""
        return self.render(body.messages, tools=body.tools, variables=body.chat_template_kwargs)

    def render(
        self,
        messages: list[ChatMessage],
        *,
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any] | None,
    ) -> Prompt:
        """Messages as the chat template writes them, special tokens included. Raises ApiError (400)."""
        rendered = template_messages(messages)
        if not self.tokenizer.knows_tools:
            rendered, tools = without_tools(rendered, self.structure.tool_format, tools), None
        try:
            text = self.tokenizer.render_chat(rendered, tools=tools, variables=variables)
        except TemplateRefused as error:
            raise bad_request(f"The chat template refuses the messages: {error}"[:500], "messages") from error
        return Prompt(self.tokenizer.encode(text, add_special_tokens=False), text)

    def start(
        self,
        endpoint: Endpoint,
        body: ChatBody | CompletionBody,
        prompts: Sequence[Prompt],
        headers: Mapping[str, str],
        *,
        grammar: str | None = None,
        parser: Callable[[str, int], OutputParser | None] = no_parser,
    ) -> Answer:
        """Check the lengths and admit the request: `prompts` times best_of (or n) choices, prompt by prompt.

        `parser` makes the parser of a choice from the id of the answer and the choice's index.
        Raises ApiError: 400, 403, 429, 503.
        """
        num_drawn = (body.best_of if isinstance(body, CompletionBody) else None) or body.num_samples
        if len(prompts) * num_drawn > MAX_CHOICES:
            raise bad_request(f"n times the number of prompts must not exceed {MAX_CHOICES}", "n")
        seed = secrets.randbits(63) if body.seed is None else body.seed
        specs = [
            ChoiceSpec(
                choice,
                prompt.ids,
                sampling_params(body, len(prompt.ids), self.limits, seed=seed, grammar=grammar),
            )
            for prompt in prompts
            for choice in range(num_drawn)
        ]
        response_id = endpoint.id_prefix + secrets.token_hex(12)
        trace = RequestTrace(self._tracer, endpoint.operation, body.model, headers)
        num_prompt_tokens = sum(len(prompt.ids) for prompt in prompts)
        try:
            current_caller.get().principal.check_model(body.model)
            generation = self.dispatcher.generate(response_id, specs, trace, priority=body.priority or 0)
        except Exception as error:
            trace.end(prompt_tokens=num_prompt_tokens, completion_tokens=0, error=str(error))
            raise
        folds = [self._fold(body, parser(response_id, index)) for index in range(len(specs))]
        answered = [prompt for prompt in prompts for _ in range(body.num_samples)]
        response_format = endpoint.format_class(
            Header(
                id=response_id,
                created=int(time.time()),
                model=body.model,
                system_fingerprint=self.fingerprint,
            ),
            [prompt.ids for prompt in answered],
            Extras(
                token_ids=bool(body.return_token_ids),
                top_logprobs=body.num_top_logprobs,
                top_prompt_logprobs=body.prompt_logprobs,
                echo_texts=[prompt.text for prompt in answered]
                if isinstance(body, CompletionBody) and body.echo
                else (),
            ),
            self.tokenizer,
        )
        return Answer(
            response_id,
            self.dispatcher,
            generation,
            response_format,
            folds,
            num_prompt_tokens,
            trace,
            num_drawn=num_drawn,
            num_kept=body.num_samples,
        )

    def _fold(self, body: GenerationBody, parser: OutputParser | None) -> ChoiceFold:
        shown = parser.visible_special_tokens if parser is not None else frozenset()
        include_stop = bool(body.include_stop_str_in_output)
        return ChoiceFold(self.tokenizer.showing(shown), body.stops, include_stop=include_stop, parser=parser)


def _fingerprint(model_name: str, model_dir: Path) -> str:
    """The same for the same model, configuration and version of this software."""
    config = model_dir / "config.json"
    parts = [model_name.encode(), config.read_bytes() if config.is_file() else b"", version().encode()]
    return "fp_" + hashlib.sha256(b"\0".join(parts)).hexdigest()[:12]


def version() -> str:
    """Of this software."""
    try:
        return importlib.metadata.version("spotserve")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
