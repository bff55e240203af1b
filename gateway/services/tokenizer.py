"""Text to token ids and back, and the model's chat template. Reads the model directory once, at start."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from tokenizers import Tokenizer

from gateway.core.fold import REPLACEMENT, Detokenizer
from gateway.errors import ModelDirectoryError, TemplateRefused
from gateway.services.piece_encoder import PieceEncoder

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class TextTokenizer:
    """The tokenizer and chat template of a model directory; a `Detokenizer` for the fold.

    Raises ModelDirectoryError if tokenizer.json, a configuration or the template cannot be read.
    """

    def __init__(self, model_dir: Path) -> None:
        self._tokenizer = _load_tokenizer(model_dir / "tokenizer.json")
        self._pieces = PieceEncoder(self._tokenizer)
        added = self._tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(i for i, token in added.items() if token.special)
        self._added_texts = {i: token.content for i, token in added.items()}
        decoder = json.loads(self._tokenizer.to_str()).get("decoder")
        self._is_byte_level = "ByteLevel" in json.dumps(decoder)
        self.adds_bytes = isinstance(decoder, dict) and decoder.get("type") == "ByteLevel"
        """Whether the text of some tokens is the bytes of each, one after the other, and nothing else."""
        self._byte_ids = self._find_byte_ids() if "ByteFallback" in json.dumps(decoder) else frozenset()
        self._whole_texts: dict[int, str | None] = {}
        self._showing: dict[frozenset[int], Detokenizer] = {}
        config = _read_json(model_dir / "config.json")
        tokenizer_config = _read_json(model_dir / "tokenizer_config.json")
        generation_config = _read_json(model_dir / "generation_config.json")
        self.vocab_size: int = config.get("vocab_size") or self._tokenizer.get_vocab_size()
        self.max_model_len: int | None = config.get("max_position_embeddings")
        self._template_variables = _special_tokens(tokenizer_config)
        self.eos_token_ids = self._find_eos_ids(config, generation_config)
        self.template_source = _template_source(model_dir, tokenizer_config)
        """The chat template; None if there is none."""
        self.knows_tools = re.search(r"\btools\b", self.template_source or "") is not None
        """Whether the chat template writes tools into the prompt."""
        self._template = _load_template(model_dir, self.template_source)

    def special_id(self, text: str) -> int | None:
        """Id of the special token that is written so; None if there is none."""
        token_id = self._tokenizer.token_to_id(text)
        return token_id if token_id in self._special_ids else None

    def showing(self, special_tokens: frozenset[str]) -> Detokenizer:
        """A detokenizer that shows these special tokens as text."""
        if not special_tokens:
            return self
        hidden = frozenset(i for i in self._special_ids if self._added_texts[i] not in special_tokens)
        if hidden == self._special_ids:
            return self
        return self._showing.setdefault(hidden, _Showing(self, self._tokenizer, hidden))

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of `text`, with what the tokenizer adds by itself (such as BOS) if asked for."""
        if not add_special_tokens:
            return self._pieces.encode(text)
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` without special tokens; bytes that are no UTF-8 become U+FFFD."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids

    def is_byte(self, token_id: int) -> bool:
        return token_id in self._byte_ids

    def whole_text(self, token_id: int) -> str | None:
        """Text of the token wherever it stands after whole characters; None if it depends on its neighbours."""
        try:
            return self._whole_texts[token_id]
        except KeyError:
            return self._whole_texts.setdefault(token_id, _whole_text(self, token_id, self.adds_bytes))

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to a text, as bytes; special tokens by their name, unknown ids empty."""
        if token_id in self._added_texts:
            return self._added_texts[token_id].encode()
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self._is_byte_level:
            return bytes(_BYTE_OF_CHAR[char] for char in token if char in _BYTE_OF_CHAR)
        if self.is_byte(token_id):
            return bytes([int(token[3:-1], 16)])
        return token.replace("\u2581", " ").encode()

    def token_string(self, token_id: int) -> str | None:
        """The token as the vocabulary writes it."""
        token: str | None = self._tokenizer.id_to_token(token_id)
        return token

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text of `messages`, up to where the assistant speaks; `variables` are the client's own.

        Raises TemplateRefused if the template does not take them, or there is none.
        """
        if self._template is None:
            raise TemplateRefused("the model has no chat template; use /v1/completions")
        try:
            return self._template.render(
                **{
                    "add_generation_prompt": True,
                    "documents": None,
                    **self._template_variables,
                    **(variables or {}),
                    "messages": messages,
                    "tools": tools,
                }
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
            raise TemplateRefused(str(error) or type(error).__name__) from error

    def _find_byte_ids(self) -> frozenset[int]:
        """Ids of raw-byte tokens, which the decoder joins itself."""
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        return frozenset(i for token, i in vocab.items() if _BYTE_TOKEN.fullmatch(token))

    def _find_eos_ids(self, config: dict[str, Any], generation_config: dict[str, Any]) -> list[int]:
        named = generation_config.get("eos_token_id", config.get("eos_token_id"))
        ids = set(named if isinstance(named, list) else [named])
        ids.add(self._tokenizer.token_to_id(self._template_variables.get("eos_token", "")))
        return sorted(i for i in ids if isinstance(i, int))


class _Showing:
    """A tokenizer's `Detokenizer` in which only `hidden` special tokens are left out."""

    def __init__(self, whole: TextTokenizer, tokenizer: Tokenizer, hidden: frozenset[int]) -> None:
        self._whole, self._tokenizer, self._hidden = whole, tokenizer, hidden
        self._whole_texts: dict[int, str | None] = {}

    def decode(self, ids: Sequence[int]) -> str:
        shown = [token_id for token_id in ids if token_id not in self._hidden]
        text: str = self._tokenizer.decode(shown, skip_special_tokens=False)
        return text

    def is_special(self, token_id: int) -> bool:
        return token_id in self._hidden

    def is_byte(self, token_id: int) -> bool:
        return self._whole.is_byte(token_id)

    def whole_text(self, token_id: int) -> str | None:
        try:
            return self._whole_texts[token_id]
        except KeyError:
            return self._whole_texts.setdefault(token_id, _whole_text(self, token_id, self._whole.adds_bytes))


def _whole_text(detokenizer: Detokenizer, token_id: int, adds_bytes: bool) -> str | None:
    """Bytes that are text by themselves stay that text after any other text; half a character does not."""
    if detokenizer.is_special(token_id):
        return ""
    text = detokenizer.decode([token_id]) if adds_bytes else REPLACEMENT
    return None if REPLACEMENT in text else text


def _bytes_of_chars() -> dict[str, int]:
    """The characters by which byte-level tokenizers (GPT-2's and its heirs) write bytes.

    Printable Latin-1 stands for itself; the other bytes, ascending, have the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTE_OF_CHAR = _bytes_of_chars()


def _load_tokenizer(path: Path) -> Tokenizer:
    if not path.is_file():
        raise ModelDirectoryError(str(path), "no such file")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise ModelDirectoryError(str(path), f"not a tokenizer: {error}") from error
    # The file may ask for both; a prompt is refused when too long, never cut, and never padded.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _read_json(path: Path) -> dict[str, Any]:
    """The object in `path`; empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelDirectoryError(str(path), f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelDirectoryError(str(path), "not a JSON object")
    return value


def _special_tokens(tokenizer_config: dict[str, Any]) -> dict[str, str]:
    """Special tokens by name; a file may have the text itself or an object that holds it."""
    found = {name: tokenizer_config.get(name) for name in _SPECIAL_NAMES}
    texts = {n: v.get("content") if isinstance(v, dict) else v for n, v in found.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _template_source(model_dir: Path, tokenizer_config: dict[str, Any]) -> str | None:
    path = model_dir / "chat_template.jinja"
    source = tokenizer_config.get("chat_template")
    if isinstance(source, list):
        named = {entry["name"]: entry["template"] for entry in source}
        source = named.get("default")
    if path.is_file():
        source = path.read_text(encoding="utf-8")
    return source if isinstance(source, str) else None


def _load_template(model_dir: Path, source: str | None) -> jinja2.Template | None:
    if source is None:
        return None
    try:
        template = _template_environment().from_string(source)
    except jinja2.TemplateError as error:
        raise ModelDirectoryError(str(model_dir), f"chat template: {error}") from error
    # A chain of mappings, copied for each prompt: one dict is quicker.
    template.globals = dict(template.globals)
    return template


def _template_environment() -> jinja2.Environment:
    """What chat templates are written for: the environment in which transformers renders them."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False, **options: Any) -> str:
    # Unlike jinja's own filter: no HTML escapes, text as it is.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:  # noqa: A002 # templates may name the argument
    return datetime.now().strftime(format)  # noqa: DTZ005 # local time, as templates expect
