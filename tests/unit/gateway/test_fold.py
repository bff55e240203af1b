"""The fold: text is exact at every seam, stop strings are found across seams, cuts of the log do not matter."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from gateway.core.fold import ChoiceFold, IncrementalText, StopScanner


class Detokenizer:
    def __init__(self, tokenizer, byte_tokens=False):
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._special = {i for i, token in added.items() if token.special}
        vocab = tokenizer.get_vocab()
        self._bytes = {i for t, i in vocab.items() if byte_tokens and t.startswith("<0x")}
        self.size = tokenizer.get_vocab_size()

    def decode(self, ids):
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def is_special(self, token_id):
        return token_id in self._special

    def is_byte(self, token_id):
        return token_id in self._bytes

    def whole_text(self, token_id):
        if token_id in self._special:
            return ""
        text = self.decode([token_id])
        return None if self._bytes or "\ufffd" in text else text


def byte_level():
    """As GPT-2, Llama 3, Qwen and SmolLM2 have it: every token is some bytes."""
    words = ["he", "llo", "\u0120wor", "ld", "\u00c3\u00a9", "\u00f0\u0141", "\u013b\u0124"]
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for word in words:
        vocab.setdefault(word, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    return Detokenizer(tokenizer)


def sentence_piece():
    """As Llama 2 and Mistral have it: words with a space mark, bytes as a fallback, the first space stripped."""
    pieces = ["<unk>", "<s>", "\u2581", "\u2581he", "llo", "\u2581\u2581", "a", "\u00e9", "\u65e5"]
    pieces += [f"<0x{byte:02X}>" for byte in (0x0A, 0x41, 0x80, 0x9F, 0x98, 0x99, 0xC3, 0xA9, 0xE6, 0xF0, 0xFF)]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    return Detokenizer(tokenizer, byte_tokens=True)


KINDS = {"byte_level": byte_level(), "sentence_piece": sentence_piece()}
kinds = st.sampled_from(sorted(KINDS))
logs = st.lists(st.integers(0, 10_000), max_size=60)


def to_ids(detokenizer, log):
    return [number % detokenizer.size for number in log]


@given(kinds, logs)
def test_pieces_join_to_the_whole_text(kind, log):
    detokenizer = KINDS[kind]
    ids = to_ids(detokenizer, log)
    text = IncrementalText(detokenizer)
    pieces = [text.push(token_id) for token_id in ids] + [text.finish()]
    assert "".join(pieces) == detokenizer.decode(ids)


def bytes_to_ids(text):
    """One token a byte, so that each character of more bytes has seams inside."""
    tokenizer = KINDS["byte_level"]._tokenizer
    pre = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return [tokenizer.token_to_id(c) for c in pre.pre_tokenize_str(text)[0][0]] if text else []


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=30))
def test_valid_text_never_shows_a_replacement(text):
    incremental = IncrementalText(KINDS["byte_level"])
    pieces = [incremental.push(token_id) for token_id in bytes_to_ids(text)]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) == text


def test_text_comes_as_soon_as_it_is_final():
    incremental = IncrementalText(KINDS["byte_level"])
    pieces = [incremental.push(token_id) for token_id in bytes_to_ids("a\u00e9b\U0001f642!")]
    assert pieces == ["a", "", "\u00e9", "b", "", "", "", "\U0001f642", "!"]


def test_broken_bytes_do_not_hold_the_text_back():
    incremental = IncrementalText(KINDS["byte_level"])
    broken = [bytes_to_ids("\U0001f642")[0]] * 3
    assert [incremental.push(i) for i in broken] == ["", "\ufffd", "\ufffd"]
    assert incremental.finish() == "\ufffd"


alphabet = st.text("abc", max_size=40)
stops = st.lists(st.text("abc", min_size=1, max_size=4), max_size=3)


def earliest_stop(text, stops):
    """Where the text ends by the definition: the first end of a match, and of those the earliest start."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return min(starts)
    return None


@given(alphabet, stops, st.data())
def test_stop_scanner_agrees_with_the_definition(text, stops, data):
    scanner = StopScanner(stops)
    found, seen = False, []
    rest = text
    while rest and not found:
        size = data.draw(st.integers(1, len(rest)))
        piece, rest = rest[:size], rest[size:]
        visible, found = scanner.push(piece)
        seen.append(visible)
    if not found:
        seen.append(scanner.flush())
    end = earliest_stop(text, stops)
    assert found == (end is not None)
    assert "".join(seen) == (text if end is None else text[:end])


def fold_in_frames(detokenizer, frames, stops, finish):
    fold = ChoiceFold(detokenizer, stops)
    deltas = [fold.push(ids, finish if i == len(frames) - 1 else None) for i, ids in enumerate(frames)]
    return (
        "".join(d.text for d in deltas),
        [i for d in deltas for i in d.token_ids],
        fold.finish_reason,
        fold.num_tokens,
    )


@given(
    kinds,
    st.lists(logs.filter(bool), min_size=1, max_size=6),
    st.lists(st.sampled_from(["he", "llo", "o w", "a", "\ufffd", "\u00e9", "lo\n"]), max_size=2),
    st.sampled_from(["stop", "length"]),
)
def test_result_does_not_depend_on_frames(kind, cuts, stops, finish):
    detokenizer = KINDS[kind]
    frames = [to_ids(detokenizer, cut) for cut in cuts]
    log = [i for frame in frames for i in frame]
    in_frames = fold_in_frames(detokenizer, frames, stops, finish)
    assert in_frames == fold_in_frames(detokenizer, [log], stops, finish)
    assert in_frames == fold_in_frames(detokenizer, [[i] for i in log], stops, finish)
    text, ids, reason, num_tokens = in_frames
    assert ids == log[:num_tokens]
    whole = detokenizer.decode(log[:-1] if finish == "stop" else log)
    end = earliest_stop(whole, stops)
    assert text == (whole if end is None else whole[:end])
    assert reason == (finish if end is None else "stop")


@pytest.mark.parametrize(("finish", "text"), [("stop", "a"), ("length", "ab")])
def test_last_id_of_a_stop_is_counted_and_not_shown(finish, text):
    fold = ChoiceFold(KINDS["byte_level"])
    delta = fold.push(bytes_to_ids("ab"), finish)
    assert (delta.text, delta.finish_reason, fold.num_tokens) == (text, finish, 2)


def test_nothing_after_the_end():
    fold = ChoiceFold(KINDS["byte_level"], ["b"])
    assert fold.push(bytes_to_ids("abc")).text == "a"
    assert (fold.num_tokens, fold.finish_reason) == (2, "stop")
    late = fold.push(bytes_to_ids("d"), "length")
    assert (late.text, late.token_ids, fold.num_tokens) == ("", [], 2)
