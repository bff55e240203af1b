"""The store: units in and out unchanged, whole tensors as in the checkpoint, directories that are cleaned up."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from engine.backends.tensorrt_llm.weight_store import SharedWeights, checkpoint_checksum, store_dir, tensor_shapes
from engine.backends.torch.checkpoint import Checkpoint
from engine.backends.torch.units import unit_to_bytes
from engine.errors import CorruptUnit, EngineUnavailable, MissingUnit
from tests.tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), layers=2)


@pytest.fixture
def store(model_dir: Path, tmp_path: Path) -> SharedWeights:
    weights = SharedWeights(Checkpoint(model_dir).config, torch.float32, tmp_path / "store")
    weights.create(1)
    return weights


def fill(store: SharedWeights, model_dir: Path) -> list[tuple[int, int]]:
    checkpoint, config = Checkpoint(model_dir), store.config
    units = list(itertools.product(range(-1, config.num_layers + 1), range(config.num_kv_heads)))
    for layer, group in units:
        store.put(layer, group, checkpoint.load_unit(layer, group, torch.float32))
    return units


def test_a_store_with_all_units_has_the_tensors_of_the_checkpoint(store: SharedWeights, model_dir: Path) -> None:
    units = fill(store, model_dir)
    assert store.units() == set(units)
    compared = 0
    with safe_open(model_dir / "model.safetensors", framework="pt") as file:
        for layer in range(-1, store.config.num_layers + 1):
            for name in tensor_shapes(store.config, layer):
                assert torch.equal(store.tensor(layer, name), file.get_tensor(name).float()), name
                compared += 1
        assert compared == len(file.keys())


def test_a_unit_leaves_as_the_bytes_that_any_backend_makes_of_it(store: SharedWeights, model_dir: Path) -> None:
    checkpoint = Checkpoint(model_dir)
    for layer, group in fill(store, model_dir):
        expected = unit_to_bytes(store.config, layer, checkpoint.load_unit(layer, group, torch.float32))
        assert store.export_unit(layer, group) == expected


def test_what_one_instance_sends_another_holds(store: SharedWeights, model_dir: Path, tmp_path: Path) -> None:
    fill(store, model_dir)
    other = SharedWeights(store.config, torch.float32, tmp_path / "other")
    other.create(1)
    other.import_unit(0, 1, store.export_unit(0, 1))
    assert other.units() == {(0, 1)}
    assert other.export_unit(0, 1) == store.export_unit(0, 1)
    with pytest.raises(MissingUnit, match="layer 0 group 0"):
        other.export_unit(0, 0)


def test_another_process_of_the_instance_sees_the_units(store: SharedWeights, model_dir: Path) -> None:
    fill(store, model_dir)
    other = SharedWeights(store.config, torch.float32, store.directory)
    other.create(1)
    assert other.units() == store.units()
    assert other.export_unit(1, 2) == store.export_unit(1, 2)


def test_a_unit_of_a_wrong_size_is_not_held(store: SharedWeights) -> None:
    with pytest.raises(CorruptUnit):
        store.import_unit(0, 0, b"1234")
    assert store.units() == set()


def test_a_store_whose_owner_is_gone_is_removed(store: SharedWeights, model_dir: Path, tmp_path: Path) -> None:
    left = store_dir(tmp_path, checkpoint_checksum(model_dir), "float32", "an instance")
    SharedWeights(store.config, torch.float32, left).create(2**22 + 1)  # No process has so high a number.
    assert left.exists()
    kept = store_dir(tmp_path, checkpoint_checksum(model_dir), "float32", "another instance")
    SharedWeights(store.config, torch.float32, kept).create(1)
    assert not left.exists()
    assert kept.exists()


def test_weights_that_do_not_fit_are_refused_with_what_to_do(store: SharedWeights) -> None:
    with pytest.raises(EngineUnavailable, match=r"do not fit into .*--shm-size.*SPOTSERVE_ENGINE_STORE_DIR"):
        store.check_room(1 << 60)


def test_stores_of_other_checkpoints_dtypes_and_instances_are_others(model_dir: Path, tmp_path: Path) -> None:
    other = make_tiny_model(tmp_path / "other", layers=2, seed=1)
    names = {
        store_dir(tmp_path, checkpoint_checksum(directory), dtype, owner)
        for directory, dtype, owner in itertools.product([model_dir, other], ["float32", "bfloat16"], ["a", "b"])
    }
    assert len(names) == 8


def test_copies_of_a_checkpoint_on_several_nodes_have_one_checksum(model_dir: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model_dir, tmp_path / "copy")
    assert checkpoint_checksum(copy) == checkpoint_checksum(model_dir)


def test_no_file_grows_by_being_mapped(store: SharedWeights, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.from_file puts a zero over the first byte of a file that is too short: of another rank's unit, perhaps."""
    too_short: list[str] = []
    from_file = torch.from_file

    def watched(path: str, *, shared: bool, size: int, dtype: torch.dtype) -> torch.Tensor:
        if not Path(path).exists() or Path(path).stat().st_size != size * dtype.itemsize:
            too_short.append(path)
        return from_file(path, shared=shared, size=size, dtype=dtype)

    monkeypatch.setattr(torch, "from_file", watched)
    fill(store, model_dir)
    assert too_short == []
