"""Tables, checks against targets, and the file of figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loadtest.memory_bench import kv_bytes, weight_bytes
from loadtest.report import Check, Machine, Report, Table, write_json
from loadtest.startup_bench import steps_of
from planner.protocol import ModelShape, Pipeline, Shard, Stage

MODEL = ModelShape(
    name="m",
    num_layers=4,
    num_head_groups=3,
    decoder_unit_bytes=100,
    embedding_unit_bytes=1000,
    head_unit_bytes=10,
    kv_unit_bytes_per_token=2,
    kv_block_tokens=16,
    max_model_len=64,
    hidden_bytes_per_token=1,
    tied_embeddings=True,
)


def stage(first_layer: int, last_layer: int, rank: str, first_group: int = 0, last_group: int = 2) -> Stage:
    shard = Shard(rank=rank, instance=rank[:2], first_group=first_group, last_group=last_group)
    return Stage(first_layer=first_layer, last_layer=last_layer, shards=[shard])


@pytest.mark.parametrize(
    ("value", "target", "higher", "met"),
    [(0.9, 1.0, False, True), (1.1, 1.0, False, False), (1.4, 1.3, True, True), (1.2, 1.3, True, False)],
)
def test_a_check_knows_its_direction(value: float, target: float, higher: bool, met: bool) -> None:
    check = Check(name="x", value=value, unit="s", target=target, higher_is_better=higher)
    assert check.is_met is met
    assert str(check).startswith("met" if met else "MISSED")


def test_nothing_measured_meets_no_target() -> None:
    assert not Check(name="x", value=None, unit="s", target=1.0).is_met


def test_a_table_is_aligned() -> None:
    lines = str(Table("title", ["", "s"], [["a long name", "1"], ["b", "10.5"]])).splitlines()
    assert lines == ["title", "                  s", "  a long name     1", "  b            10.5"]


def test_the_file_holds_command_and_figures(tmp_path: Path) -> None:
    check = Check(name="x", value=2.0, unit="s", target=1.0)
    report = Report(name="pause", tables=[], checks=[check], figures={"a": 1}, failure="ended early")
    write_json(tmp_path / "out.json", ["python", "-m", "loadtest"], Machine.inspect(), [report])
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["command"] == "python -m loadtest"
    (written,) = content["benchmarks"]
    assert written["figures"] == {"a": 1}
    assert written["failure"] == "ended early"
    assert written["checks"][0]["is_met"] is False
    assert content["machine"]["num_cpus"] >= 1


def test_the_share_of_a_rank() -> None:
    pipeline = Pipeline(id="p1", stages=[stage(0, 1, "i0-0"), stage(2, 3, "i1-0")], max_batch=1, num_kv_blocks=1)
    # The last stage of a tied model holds the embedding as well as the head.
    assert weight_bytes(MODEL, pipeline, "i0-0") == 3 * (1000 + 2 * 100)
    assert weight_bytes(MODEL, pipeline, "i1-0") == 3 * (1000 + 2 * 100 + 10)
    assert kv_bytes(MODEL, pipeline, "i1-0", num_blocks=5) == 5 * 16 * 2 * 3 * 2
    one_group = Pipeline(id="p2", stages=[stage(0, 3, "i0-0", 1, 1)], max_batch=1, num_kv_blocks=1)
    assert weight_bytes(MODEL, one_group, "i0-0") == 1000 + 4 * 100 + 10


def test_the_steps_of_a_start_are_read_from_its_output() -> None:
    output = "fetching the model\n[   1.2 s] nats-server is ready\n\n  curl ...\n[  13.0 s] ready: m, bfloat16\n"
    assert steps_of(output) == [(1.2, "nats-server is ready"), (13.0, "ready: m, bfloat16")]
