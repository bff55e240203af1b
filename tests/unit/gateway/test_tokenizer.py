"""Tokenizer, chat template and end-of-sequence ids of a model directory."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from gateway.errors import ModelDirectoryError, TemplateRefused
from gateway.services.tokenizer import TextTokenizer

MESSAGES = [{"role": "user", "content": "a<b & é"}]


@pytest.fixture
def make(tmp_path):
    def make_tokenizer(template=None, *, template_file=None, generation=None, **tokenizer_config):
        vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        tokenizer = Tokenizer(models.BPE(vocab, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
        tokenizer.enable_truncation(4)
        tokenizer.enable_padding(length=8)
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": template}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, **tokenizer_config}))
        (tmp_path / "config.json").write_text('{"max_position_embeddings": 99, "eos_token_id": 5}')
        if generation is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        if template_file is not None:
            (tmp_path / "chat_template.jinja").write_text(template_file)
        return TextTokenizer(tmp_path)

    return make_tokenizer


def test_encode_neither_cuts_nor_pads(make):
    tokenizer = make()
    assert len(tokenizer.encode("abcdefghij", add_special_tokens=True)) == 11
    assert len(tokenizer.encode("a", add_special_tokens=False)) == 1
    assert tokenizer.decode(tokenizer.encode("naïve 🙂", add_special_tokens=True)) == "naïve 🙂"
    assert tokenizer.max_model_len == 99


def test_template_sees_what_it_may_use(make):
    template = "{{ bos_token }}{% for m in messages %}\n  {% if loop.first %}{{ m.content }}{% endif %}\n{% endfor %}"
    assert make(template).render_chat(MESSAGES) == "<s>a<b & é"
    assert make("{{ messages | tojson }}").render_chat(MESSAGES) == json.dumps(MESSAGES, ensure_ascii=False)
    assert make("{{ strftime_now('%Y') }}").render_chat(MESSAGES).isdigit()
    assert make("{% if add_generation_prompt %}go{% endif %}").render_chat(MESSAGES) == "go"
    assert make("{% for m in messages %}{% break %}{% endfor %}x").render_chat(MESSAGES) == "x"


def test_template_file_wins_over_the_configuration(make):
    assert make("old", template_file="new").render_chat(MESSAGES) == "new"


def test_named_templates(make):
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    assert make(named).render_chat(MESSAGES) == "d"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages[7].content.upper() }}", "no element 7"),
        (None, "no chat template"),
    ],
)
def test_template_refusal(make, template, reason):
    with pytest.raises(TemplateRefused, match=reason):
        make(template).render_chat(MESSAGES)


def test_end_of_sequence_ids(make):
    end = 257
    assert make().eos_token_ids == [5, end]
    assert make(generation={"eos_token_id": [7, 8]}).eos_token_ids == [7, 8, end]
    assert make(eos_token=None).eos_token_ids == [7, 8]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tokenizer.json", "{}"),
        ("config.json", "{"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"chat_template": "{% if %}"}'),
    ],
)
def test_bad_file_is_named(make, tmp_path, name, text):
    make()
    (tmp_path / name).write_text(text)
    with pytest.raises(ModelDirectoryError, match=r"chat template|" + name.replace(".", r"\.")):
        TextTokenizer(tmp_path)


def test_missing_tokenizer(tmp_path):
    with pytest.raises(ModelDirectoryError, match=r"tokenizer\.json"):
        TextTokenizer(tmp_path)


def test_text_of_a_token_by_itself(make):
    tokenizer = make()
    ids = tokenizer.encode("aé", add_special_tokens=False)
    assert [tokenizer.whole_text(i) for i in ids] == ["a", None, None]
    special = tokenizer.special_id("<s>")
    assert tokenizer.whole_text(special) == ""
    assert tokenizer.showing(frozenset({"<s>"})).whole_text(special) == "<s>"
    assert tokenizer.showing(frozenset({"<s>"})) is tokenizer.showing(frozenset({"<s>"}))
