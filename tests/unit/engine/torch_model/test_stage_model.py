"""Logits against transformers, and equality across shapes, batches, chunks and moves."""

from __future__ import annotations

import threading

import pytest
import torch

from engine.backends.torch.stage_model import SequenceSlice, SoloGroup, StageBatch, StageModel
from engine.backends.torch.weights import WeightStore
from engine.errors import InvalidModelConfig, MissingUnit

FAMILIES = ["llama", "llama-yarn", "mistral", "qwen2", "qwen3"]
SHAPES = [(1, 1), (2, 1), (3, 1), (1, 3), (2, 3), (3, 3)]
CPU = torch.device("cpu")


def prompt(seed: int, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 200, (length,), generator=generator).tolist()


def reference_logits(model, ids: list[int]):
    with torch.no_grad():
        return model.reference(torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("reduction", ["fast", "fixed"])
@pytest.mark.parametrize(("num_stages", "num_shards"), SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_the_reference(tiny_model, build_pipeline, family, num_stages, num_shards, reduction):
    model = tiny_model(family)
    pipeline = build_pipeline(model.checkpoint, num_stages, num_shards, reduction)
    a, b, c = prompt(1, 45), prompt(2, 9), prompt(3, 70)
    # Prefill in chunks beside decode tokens, in one batch.
    pipeline.step({"a": a[:20], "b": b[:8]})
    pipeline.step({"b": b[8:9], "a": a[20:44], "c": c[:69]})
    got = pipeline.step({"a": a[44:], "c": c[69:]})
    for name, ids in (("a", a), ("c", c)):
        torch.testing.assert_close(got[name], reference_logits(model, ids)[-1], rtol=1e-4, atol=2e-4)


def decode(pipeline, tokens: dict[str, list[int]], num_steps: int) -> list[dict[str, torch.Tensor]]:
    """Greedy steps after the prompts; the logits of each step."""
    steps = [pipeline.step(tokens)]
    for _ in range(num_steps - 1):
        steps.append(pipeline.step({name: [int(row.argmax())] for name, row in steps[-1].items()}))
    return steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_more_stages_change_no_bit_when_fast(tiny_model, build_pipeline, family, dtype):
    model = tiny_model(family)
    prompts = {"a": prompt(4, 21), "b": prompt(5, 3), "c": prompt(6, 40)}
    runs = [decode(build_pipeline(model.checkpoint, n, 1, "fast", dtype), prompts, 6) for n in (1, 2, 3)]
    for step in zip(*runs, strict=True):
        for name in prompts:
            assert torch.equal(step[0][name], step[1][name])
            assert torch.equal(step[0][name], step[2][name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_fixed_gives_the_same_bits_for_every_shape_batch_and_chunk(tiny_model, build_pipeline, family, dtype):
    model = tiny_model(family)
    ids = {"a": prompt(7, 90), "b": prompt(8, 33), "c": prompt(9, 17)}
    # Alone, one token after the other, on one rank: what all others must give.
    wanted: dict[str, list[torch.Tensor]] = {}
    for name, tokens in ids.items():
        alone = build_pipeline(model.checkpoint, 1, 1, "fixed", dtype)
        wanted[name] = [alone.step({name: [token]})[name] for token in tokens]
    for num_stages, num_shards in [(1, 1), (1, 3), (3, 1), (2, 3)]:
        pipeline = build_pipeline(model.checkpoint, num_stages, num_shards, "fixed", dtype)
        done = dict.fromkeys(ids, 0)
        chunk = {"a": 23, "b": 5, "c": 1}
        while any(done[name] < len(tokens) for name, tokens in ids.items()):
            pieces = {n: t[done[n] : done[n] + chunk[n]] for n, t in ids.items() if done[n] < len(t)}
            for name, row in pipeline.step(pieces).items():
                done[name] += len(pieces[name])
                assert torch.equal(row, wanted[name][done[name] - 1]), (num_stages, num_shards, name, done)


@pytest.mark.parametrize(("source", "target"), [((1, 1), (3, 3)), ((2, 3), (3, 1)), ((3, 1), (1, 1)), ((1, 3), (2, 1))])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_move_of_units_and_kv_to_another_shape_changes_no_bit(
    tiny_model, build_pipeline, all_units, family, source, target
):
    model = tiny_model(family)
    prompts = {"a": prompt(10, 30), "b": prompt(11, 19)}
    undisturbed = decode(build_pipeline(model.checkpoint, 1, 1, "fixed"), prompts, 12)
    old = build_pipeline(model.checkpoint, *source, "fixed")
    steps = decode(old, prompts, 5)

    config = model.checkpoint.config
    units = {unit: data for stage in old.stages for rank in stage for unit, data in exported(rank[2]).items()}
    assert set(units) == set(all_units(model.checkpoint))
    stores = [[WeightStore(config, torch.float32, CPU) for _ in range(target[1])] for _ in range(target[0])]
    for row in stores:
        for store in row:
            for (layer, group), data in units.items():
                store.import_unit(layer, group, data)
    new = build_pipeline(model.checkpoint, *target, "fixed", block_tokens=4, stores=stores)
    for name, length in old.lengths.items():
        new.lengths[name] = length
        new.tables[name] = list(range(20 * len(new.tables), 20 * len(new.tables) + 20))
        move_kv(old, new, name)
    last = steps[-1]
    steps += decode(new, {name: [int(row.argmax())] for name, row in last.items()}, 7)
    for got, wanted in zip(steps, undisturbed, strict=True):
        for name in prompts:
            assert torch.equal(got[name], wanted[name])


def exported(store: WeightStore) -> dict[tuple[int, int], bytes]:
    return {unit: store.export_unit(*unit) for unit in store.units()}


def move_kv(old, new, name: str) -> None:
    for (first, last), stage in zip(new.ranges, new.stages, strict=True):
        for (low, high), (_, pool, _) in zip(new.groups, stage, strict=True):
            for layer in range(first, last + 1):
                for group in range(low, high + 1):
                    data = pool_of(old, layer, group).export_sequence(layer, group, old.tables[name], old.lengths[name])
                    pool.import_sequence(layer, group, new.tables[name], old.lengths[name], data)


def pool_of(pipeline, layer: int, group: int):
    stage = next(s for s, (a, b) in enumerate(pipeline.ranges) if a <= layer <= b)
    shard = next(m for m, (a, b) in enumerate(pipeline.groups) if a <= group <= b)
    return pipeline.stages[stage][shard][1]


def test_units_missing_are_named(tiny_model):
    checkpoint = tiny_model("llama").checkpoint
    store = WeightStore(checkpoint.config, torch.float32, CPU)
    store.put(2, 0, checkpoint.load_unit(2, 0, torch.float32))
    with pytest.raises(MissingUnit, match="layer 3 group 0") as caught:
        StageModel(checkpoint.config, 2, 3, 0, 0, store, SoloGroup(), "fast", 64)
    assert caught.value.units == [(3, 0)]


def test_longer_than_the_model_can_is_refused(tiny_model):
    checkpoint = tiny_model("qwen2").checkpoint
    store = WeightStore(checkpoint.config, torch.float32, CPU)
    store.put(2, 0, checkpoint.load_unit(2, 0, torch.float32))
    with pytest.raises(InvalidModelConfig, match="max_position_embeddings"):
        StageModel(checkpoint.config, 2, 2, 0, 0, store, SoloGroup(), "fast", 4096)


def test_no_wanted_logits_give_no_rows_and_the_hidden_state_is_left_alone(tiny_model, build_pipeline):
    model = tiny_model("qwen2")
    pipeline = build_pipeline(model.checkpoint, 2, 1)
    (first, first_pool, _), (second, second_pool, _) = pipeline.stages[0][0], pipeline.stages[1][0]
    batch = StageBatch([5, 6, 7], [SequenceSlice(3, 0, [0], num_logits=0)])
    hidden = first.forward(batch, None, first_pool)
    before = hidden.clone()
    assert second.forward(batch, hidden, second_pool).shape == (0, 200)
    assert torch.equal(hidden, before)


def test_a_model_serves_undisturbed_while_another_shape_is_built_over_its_store(tiny_model, build_pipeline):
    model = tiny_model("llama")
    pipeline = build_pipeline(model.checkpoint, 1, 1)
    store = pipeline.stages[0][0][2]
    wanted = decode(build_pipeline(model.checkpoint, 1, 1), {"a": prompt(12, 10)}, 40)
    config = model.checkpoint.config
    built = []

    def rebuild() -> None:
        for first, last, low, high in [(0, 5, 0, 0), (0, 2, 1, 2), (3, 5, 0, 2), (0, 5, 0, 2)] * 4:
            built.append(StageModel(config, first, last, low, high, store, SoloGroup(), "fast", 64))
            data = store.export_unit(3, 1)
            store.import_unit(3, 1, data)

    builder = threading.Thread(target=rebuild)
    builder.start()
    got = decode(pipeline, {"a": prompt(12, 10)}, 40)
    builder.join(60)
    assert len(built) == 16
    assert all(torch.equal(x["a"], y["a"]) for x, y in zip(got, wanted, strict=True))
