"""Units: sizes, round trips, one copy of each, and checkpoints that are broken."""

from __future__ import annotations

import gc
import json
import shutil
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.backends.torch.layers import DecoderBlock, Linear
from engine.backends.torch.stage_model import SoloGroup, StageModel
from engine.backends.torch.units import unit_to_bytes
from engine.backends.torch.weights import Checkpoint, WeightStore
from engine.errors import CorruptUnit, InvalidModelConfig, MissingTensor, MissingUnit, UnsupportedModel

CPU = torch.device("cpu")
FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]


def filled_store(checkpoint, units, dtype=torch.float32) -> WeightStore:
    store = WeightStore(checkpoint.config, dtype, CPU)
    for layer, group in units:
        store.put(layer, group, checkpoint.load_unit(layer, group, dtype))
    return store


def whole_model(checkpoint, store, first_group=0, last_group=2, reduction="fast") -> StageModel:
    config = checkpoint.config
    return StageModel(config, 0, 5, first_group, last_group, store, SoloGroup(), reduction, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_unit_leaves_every_form_as_the_bytes_it_came_in(tiny_model, all_units, family, dtype):
    checkpoint = tiny_model(family).checkpoint
    units = all_units(checkpoint)
    shape = checkpoint.config.shape("tiny", dtype.itemsize, 8, None)
    store = filled_store(checkpoint, units, dtype)
    given = {unit: store.export_unit(*unit) for unit in units}
    assert all(len(data) == shape.unit_bytes(layer) for (layer, _), data in given.items())
    forms = [(0, 2, "fast"), (1, 2, "fast"), (0, 2, "fixed"), (0, 0, "fast")]
    for first_group, last_group, reduction in forms:
        whole_model(checkpoint, store, first_group, last_group, reduction)
        assert {unit: store.export_unit(*unit) for unit in units} == given
    other = WeightStore(checkpoint.config, dtype, CPU)
    for (layer, group), data in given.items():
        other.import_unit(layer, group, memoryview(data))
    assert {unit: other.export_unit(*unit) for unit in units} == given


@pytest.mark.parametrize("family", FAMILIES)
def test_the_units_of_a_layer_are_its_checkpoint_tensors(tiny_model, family):
    model = tiny_model(family)
    config, state = model.checkpoint.config, model.reference.state_dict()
    dim, queries = config.head_dim, config.heads_per_group
    units = [model.checkpoint.load_unit(4, group, torch.float32) for group in range(3)]
    q, k, v = (
        torch.cat(part) for part in zip(*(u["qkv"].split([queries * dim, dim, dim]) for u in units), strict=True)
    )
    for name, matrix in (("q", q), ("k", k), ("v", v)):
        assert torch.equal(matrix, state[f"model.layers.4.self_attn.{name}_proj.weight"])
    sizes = [b - a for a, b in (config.columns_of_group(100, g) for g in range(3))]
    assert sizes == [33, 33, 34]
    up = torch.cat([u["gate_up"][34 : 34 + size] for u, size in zip(units, sizes, strict=True)])
    assert torch.equal(up, state["model.layers.4.mlp.up_proj.weight"])
    assert units[0]["gate_up"][33].abs().max() == 0  # padding


def test_a_bad_size_is_refused_and_changes_nothing(tiny_model):
    checkpoint = tiny_model("llama").checkpoint
    store = filled_store(checkpoint, [(1, 2)])
    data = store.export_unit(1, 2)
    with pytest.raises(CorruptUnit, match=r"layer 1, group 2.*expected"):
        store.import_unit(1, 2, data[:-4])
    assert store.export_unit(1, 2) == data
    with pytest.raises(MissingUnit, match="layer 1 group 0"):
        store.export_unit(1, 0)


def test_a_second_model_of_the_same_shape_shares_the_blocks(tiny_model, all_units):
    checkpoint = tiny_model("qwen2").checkpoint
    store = filled_store(checkpoint, all_units(checkpoint))
    first, second = whole_model(checkpoint, store), whole_model(checkpoint, store)
    assert all(a is b for a, b in zip(first._blocks, second._blocks, strict=True))
    assert all(a is b for a, b in zip(first._head, second._head, strict=True))
    # Tied: embedding and head are one.
    assert all(a is b for a, b in zip(first._head, first._embedding, strict=True))
    shifted = StageModel(checkpoint.config, 2, 4, 0, 2, store, SoloGroup(), "fast", 64)
    assert all(a is b for a, b in zip(first._blocks[2:5], shifted._blocks, strict=True))


def test_nothing_of_the_old_form_stays_in_memory(tiny_model, all_units):
    checkpoint = tiny_model("qwen3").checkpoint
    store = filled_store(checkpoint, all_units(checkpoint))
    loose = [weakref.ref(tensor) for tensor in store.tensors(2, range(1, 2))[0].values()]
    model = whole_model(checkpoint, store)
    gc.collect()
    assert not any(ref() is not None for ref in loose)
    blocks = [weakref.ref(block) for block in model._blocks]
    del model
    kept = {(layer, 1) for layer in range(-1, 7)}
    before = {unit: store.export_unit(*unit) for unit in kept}
    store.keep_only(kept)
    gc.collect()
    assert store.units() == kept
    assert not any(ref() is not None for ref in blocks)
    assert {unit: store.export_unit(*unit) for unit in kept} == before


def test_keeping_whole_blocks_leaves_them_fused(tiny_model, all_units):
    checkpoint = tiny_model("qwen3").checkpoint
    store = filled_store(checkpoint, all_units(checkpoint))
    model = whole_model(checkpoint, store)
    store.keep_only({(2, group) for group in range(3)})
    block = store.block(DecoderBlock, 2, range(3), lambda *_: pytest.fail("fused again"))
    assert block is model._blocks[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("outputs", "inputs"), [(320, 576), (576, 512), (68, 48), (48, 33), (1024, 576)])
def test_a_packed_row_does_not_depend_on_its_place_in_a_tile(dtype, outputs, inputs):
    torch.manual_seed(0)
    linear = Linear(torch.randn(outputs, inputs).to(dtype))
    row = torch.randn(inputs).to(dtype)
    results = []
    with torch.inference_mode():
        for place in range(16):
            x = torch.randn(16, inputs).to(dtype) * 10**place
            x[place] = row
            results.append(linear(x)[place])
    assert all(torch.equal(results[0], result) for result in results)


# --- Broken checkpoints ----------------------------------------------------------------------------------------


@pytest.fixture
def broken(tiny_model, tmp_path):
    """A single-file copy of a tiny model, with a function that rewrites its tensors and config."""
    model = tiny_model("mistral")
    directory = tmp_path / "model"
    directory.mkdir()
    shutil.copy(model.directory / "config.json", directory)
    tensors: dict[str, torch.Tensor] = {}
    for path in model.directory.glob("*.safetensors"):
        tensors |= load_file(path)

    def change(tensors_changed=None, **config_changed):
        save_file(
            {n: t for n, t in {**tensors, **(tensors_changed or {})}.items() if t is not None},
            directory / "model.safetensors",
        )
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**config, **config_changed}))
        return directory

    return change


def test_a_single_file_is_read_as_the_shards_are(broken, tiny_model):
    single, sharded = Checkpoint(broken()), tiny_model("mistral").checkpoint
    for layer in (-1, 3, 6):
        one, other = (c.load_unit(layer, 1, torch.bfloat16) for c in (single, sharded))
        assert unit_to_bytes(single.config, layer, one) == unit_to_bytes(single.config, layer, other)


def test_a_missing_tensor_is_named(broken):
    with pytest.raises(MissingTensor, match=r"model\.layers\.3\.mlp\.up_proj\.weight is missing") as caught:
        Checkpoint(broken({"model.layers.3.mlp.up_proj.weight": None}))
    assert "model" in caught.value.file


def test_a_tensor_of_the_wrong_shape_or_dtype_is_named(broken):
    with pytest.raises(MissingTensor, match=r"norm\.weight has shape \[7\]"):
        Checkpoint(broken({"model.norm.weight": torch.zeros(7)}))
    with pytest.raises(MissingTensor, match=r"norm\.weight has unsupported dtype I32"):
        Checkpoint(broken({"model.norm.weight": torch.zeros(48, dtype=torch.int32)}))


def test_a_truncated_file_is_refused(broken):
    path = broken() / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(MissingTensor, match="truncated"):
        Checkpoint(path.parent)


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, (5).to_bytes(8, "little") + b"hello"])
def test_a_file_that_is_no_safetensors_is_refused(broken, content):
    path = broken() / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(MissingTensor, match=r"model\.safetensors"):
        Checkpoint(path.parent)


def test_missing_files_and_unsupported_models_are_named(broken, tiny_model, tmp_path):
    with pytest.raises(InvalidModelConfig, match=r"config\.json"):
        Checkpoint(tmp_path)
    directory = broken(model_type="gpt2")
    with pytest.raises(UnsupportedModel, match="model_type = 'gpt2'"):
        Checkpoint(directory)
    (directory / "config.json").write_text("[1]")
    with pytest.raises(InvalidModelConfig, match="not a JSON object"):
        Checkpoint(directory)
    (directory / "config.json").write_text((tiny_model("mistral").directory / "config.json").read_text())
    (directory / "model.safetensors").unlink()
    with pytest.raises(MissingTensor, match=r"model\.safetensors: weights cannot be read"):
        Checkpoint(directory)
