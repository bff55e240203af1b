"""The converter against numpy, and the converted default model against transformers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from tokenizers import Tokenizer

from deploy.default_model import cache_dir, fetch_default_model, is_whole
from deploy.gguf_conversion import bfloat16_bits, hugging_face_name, rows_in_rotated_halves

TEXTS = [
    "Hello world",
    " leading and trailing ",
    "Numbers 1234567890, 3.14159 and 1e-5",
    "don't can't we'll I'm",
    "tabs\tand\nnew\r\nlines\n\n\n  end",
    "naïve café Ünïcödé ΑΒΓ ж 漢字 かな 😀👩‍👩‍👧",
    "def f(x):\n    return x ** 2  # square",
    "<|im_start|>user\nHi<|im_end|>\n<|endoftext|>",
    "<|im_start|",
    "",
    "    ",
]


@pytest.fixture(scope="module")
def model_dir() -> Path:
    return fetch_default_model(cache_dir(os.environ), print)


@given(st_numpy.arrays(np.float32, st.integers(0, 40), elements=st.floats(width=32, allow_nan=False)))
def test_bfloat16_rounds_as_torch_does(values: Any) -> None:
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
    np.testing.assert_array_equal(bfloat16_bits(values), expected)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 3))
def test_rows_go_back_to_rotated_halves(num_heads: int, num_pairs: int, num_columns: int) -> None:
    shape = (num_heads * num_pairs * 2, num_columns)
    halves = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    paired = halves.reshape(num_heads, 2, num_pairs, num_columns).swapaxes(1, 2).reshape(shape)
    np.testing.assert_array_equal(rows_in_rotated_halves(paired, num_heads), halves)


def test_tensor_names() -> None:
    assert hugging_face_name("blk.12.ffn_down.weight") == "model.layers.12.mlp.down_proj.weight"
    assert hugging_face_name("token_embd.weight") == "model.embed_tokens.weight"
    with pytest.raises(ValueError, match=r"blk\.0\.ssm_in\.weight"):
        hugging_face_name("blk.0.ssm_in.weight")


@pytest.mark.smollm
def test_a_truncated_file_is_not_whole(model_dir: Path, tmp_path: Path) -> None:
    assert is_whole(model_dir)
    for file in model_dir.iterdir():
        (tmp_path / file.name).symlink_to(file)
    assert is_whole(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").write_text("{}")
    assert not is_whole(tmp_path)


@pytest.mark.smollm
def test_tokenizer_equals_the_one_of_transformers_and_goes_back(model_dir: Path) -> None:
    from transformers import AutoTokenizer

    ours, theirs = Tokenizer.from_file(str(model_dir / "tokenizer.json")), AutoTokenizer.from_pretrained(model_dir)
    for text in TEXTS:
        ids = ours.encode(text).ids
        assert ids == theirs.encode(text), text
        assert ours.decode(ids, skip_special_tokens=False) == text
    assert theirs.eos_token == "<|im_end|>"
    assert ours.encode("<|im_start|>").ids == [1]
    assert len(ours.encode("12345").ids) == 5  # SmolLM2 takes each digit alone


@pytest.mark.smollm
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_transformers_answers_sensibly_with_the_converted_weights(model_dir: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"
