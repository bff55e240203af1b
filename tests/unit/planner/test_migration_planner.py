import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.core.fleet import Rank
from planner.core.migration_planner import (
    FIXED_S,
    kv_migration_s,
    needed_units,
    plan_transfers,
    transfer_bytes,
    weight_migration_s,
)
from planner.protocol import ModelShape, Pipeline, RankInventory, Shard, Stage, UnitRange

MODEL = ModelShape(
    name="tiny",
    num_layers=6,
    num_head_groups=3,
    decoder_unit_bytes=1000,
    embedding_unit_bytes=500,
    head_unit_bytes=100,
    kv_unit_bytes_per_token=10,
    kv_block_tokens=16,
    max_model_len=64,
    hidden_bytes_per_token=8,
    tied_embeddings=True,
)
ALL = UnitRange(first_layer=-1, last_layer=6, first_group=0, last_group=2)


def rank(name, units=(), deadline_s=None, kv_tokens=0):
    inventory = RankInventory(
        rank=name,
        device="cpu",
        memory_bytes=1,
        context_address=name,
        store_address=name,
        units=list(units),
        kv_tokens=kv_tokens,
    )
    return Rank(instance=name, inventory=inventory, deadline_s=deadline_s)


def pipeline(*names, tensor=1):
    num_stages = len(names) // tensor
    size, width = 6 // num_stages, 3 // tensor
    stages = [
        Stage(
            first_layer=stage * size,
            last_layer=(stage + 1) * size - 1,
            shards=[
                Shard(
                    rank=names[stage * tensor + shard],
                    instance="i",
                    first_group=shard * width,
                    last_group=(shard + 1) * width - 1,
                )
                for shard in range(tensor)
            ],
        )
        for stage in range(num_stages)
    ]
    return Pipeline(id="p1", stages=stages, max_batch=1, num_kv_blocks=1)


unit_range = st.builds(
    lambda a, b, c, d: UnitRange(
        first_layer=min(a, b), last_layer=max(a, b), first_group=min(c, d), last_group=max(c, d)
    ),
    st.integers(-1, 6), st.integers(-1, 6), st.integers(0, 2), st.integers(0, 2),
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(
    held=st.lists(st.tuples(st.lists(unit_range, max_size=3), st.sampled_from([None, 5.0])), min_size=4, max_size=6),
    shape=st.sampled_from([(1, 1), (2, 1), (3, 1), (1, 3)]),
)
def test_every_needed_unit_is_held_or_pulled_once_from_holders(held, shape):
    ranks = {f"r{n}": rank(f"r{n}", units, deadline_s) for n, (units, deadline_s) in enumerate(held)}
    new = pipeline(*list(ranks)[: shape[0] * shape[1]], tensor=shape[1])
    transfers = plan_transfers(MODEL, [new], ranks)
    for stage in new.stages:
        for shard in stage.shards:
            own = set().union(*(u.units() for u in ranks[shard.rank].inventory.units))
            pulled = [unit for t in transfers.get(shard.rank, []) for unit in t.units.units()]
            assert len(pulled) == len(set(pulled))
            assert set(pulled) == needed_units(MODEL, stage, shard) - own
            for transfer in transfers.get(shard.rank, []):
                assert shard.rank not in transfer.sources
                for name in set(ranks) - {shard.rank}:
                    units = set().union(*(u.units() for u in ranks[name].inventory.units))
                    assert (name in transfer.sources) == (transfer.units.units() <= units) or any(
                        transfer.units.units() & units
                    ), "a holder of all of it is a source"
                    if name in transfer.sources:
                        assert transfer.units.units() <= units
                noticed = [ranks[name].deadline_s is not None for name in transfer.sources]
                assert noticed == sorted(noticed, reverse=True), "victims first"


def test_load_is_spread_over_the_holders():
    ranks = {name: rank(name, [ALL]) for name in ("a", "b", "c")} | {"new": rank("new")}
    transfers = plan_transfers(MODEL, [pipeline("new")], ranks)["new"]
    first = {name: sum(transfer_bytes(MODEL, [t]) for t in transfers if t.sources[0] == name) for name in "abc"}
    assert min(first.values()) > 0
    assert max(first.values()) <= sum(first.values()) / 2
    assert [t.units.first_layer for t in transfers] == sorted(t.units.first_layer for t in transfers)


def test_two_receivers_use_different_holders():
    ranks = {name: rank(name, [ALL]) for name in ("a", "b")} | {"x": rank("x"), "y": rank("y")}
    new = pipeline("x", "y")
    transfers = plan_transfers(MODEL, [new], ranks)
    load = dict.fromkeys("ab", 0)
    for planned in transfers.values():
        for transfer in planned:
            load[transfer.sources[0]] += transfer_bytes(MODEL, [transfer])
    assert max(load.values()) <= 1.5 * min(load.values())


def test_what_nobody_holds_comes_from_disk():
    transfers = plan_transfers(MODEL, [pipeline("new")], {"new": rank("new")})
    assert transfers["new"] == [type(transfers["new"][0])(units=ALL, sources=[])]


def test_seconds_follow_the_busiest():
    ranks = {"a": rank("a", [ALL]), "x": rank("x"), "y": rank("y")}
    transfers = plan_transfers(MODEL, [pipeline("x", "y")], ranks)
    total = sum(transfer_bytes(MODEL, planned) for planned in transfers.values())
    assert weight_migration_s(MODEL, transfers, 1000.0) == pytest.approx(FIXED_S + total / 1000.0)
    assert weight_migration_s(MODEL, {}, 1000.0) == 0.0


def test_kv_seconds_grow_with_the_tokens():
    old = pipeline("a", "b")
    ranks = {"a": rank("a", kv_tokens=100), "b": rank("b", kv_tokens=10)}
    expected = FIXED_S + 9 * 10 * 100 * 1.5 / 1e6
    assert kv_migration_s(MODEL, old, ranks, 1e6) == pytest.approx(expected)
    assert kv_migration_s(MODEL, old, {}, 1e6) == FIXED_S
