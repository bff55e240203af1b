"""What `status` and `plan` say, from canned answers of the planner."""

from __future__ import annotations

import io
import json

import msgspec
import pytest
from rich.console import Console, RenderableType

from deploy.client import RequestCounts
from deploy.report import plan_report, status_report
from deploy.tables import describe_bytes, describe_config, history_tables, plan_tables, status_tables
from planner.protocol import (
    Alternative,
    DesiredCapacity,
    Explanation,
    InstanceState,
    InstanceStatus,
    Market,
    ModelShape,
    ParallelConfig,
    Pipeline,
    Plan,
    Retiring,
    Shard,
    Stage,
    Status,
)

MODEL = ModelShape(
    name="tiny",
    num_layers=6,
    num_head_groups=3,
    decoder_unit_bytes=1,
    embedding_unit_bytes=1,
    head_unit_bytes=1,
    kv_unit_bytes_per_token=1,
    kv_block_tokens=16,
    max_model_len=512,
    hidden_bytes_per_token=1,
    tied_embeddings=True,
)
CONFIG = ParallelConfig(data=1, pipeline=2, tensor=1, max_batch=8)
PIPELINE = Pipeline(
    id="p3",
    stages=[
        Stage(first_layer=0, last_layer=2, shards=[Shard(rank="i0-0", instance="i0", first_group=0, last_group=2)]),
        Stage(
            first_layer=3,
            last_layer=5,
            shards=[
                Shard(rank="i1-0", instance="i1", first_group=0, last_group=0),
                Shard(rank="i2-0", instance="i2", first_group=1, last_group=2),
            ],
        ),
    ],
    max_batch=8,
    num_kv_blocks=64,
)
EXPLANATION = Explanation(
    cause="preemption notice of i3",
    cause_at_s=999.75,
    decided_at_s=1000.0,
    arrivals_per_s=1.5,
    num_ranks=3,
    chosen=CONFIG,
    alternatives=[
        Alternative(config=CONFIG, latency_s=1.25, throughput_per_s=3.5, num_ranks=2, verdict="chosen: lowest latency"),
    ],
    bytes_reused=2_500_000,
    bytes_moved=1_200_000_000,
    migration_s=0.125,
    notes=["i3 leaves in 30 s"],
)
STATUS = Status(
    epoch=7,
    instances=[
        InstanceStatus(id="i0", market=Market.SPOT, state=InstanceState.READY, deadline_s=None, ranks=["i0-0"]),
        InstanceStatus(id="i3", market=Market.ON_DEMAND, state=InstanceState.GRACE, deadline_s=1012.4, ranks=["i3-0"]),
        InstanceStatus(id="i4", market=Market.SPOT, state=InstanceState.LOST, deadline_s=1001.0, ranks=[]),
    ],
    plan=Plan(
        epoch=7,
        model=MODEL,
        pipelines=[PIPELINE],
        retiring=[],
        transfers={},
        addresses={},
        explanation=EXPLANATION,
        next_pipeline_number=4,
    ),
    history=[EXPLANATION],
)
COUNTS = RequestCounts(running=5, waiting=2, pipelines={"p3": 5})


def rendered(what: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=160, color_system=None)
    console.print(what)
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_status_json_has_the_agreed_keys() -> None:
    report = json.loads(msgspec.json.encode(status_report(STATUS, COUNTS)))
    assert report == {
        "epoch": 7,
        "instances": [
            {"id": "i0", "market": "spot", "state": "ready", "deadline_s": None, "ranks": ["i0-0"]},
            {"id": "i3", "market": "on_demand", "state": "grace", "deadline_s": 1012.4, "ranks": ["i3-0"]},
            {"id": "i4", "market": "spot", "state": "lost", "deadline_s": 1001.0, "ranks": []},
        ],
        "pipelines": [
            {
                "id": "p3",
                "stages": [
                    {"layers": [0, 2], "shards": [{"rank": "i0-0", "instance": "i0", "head_groups": [0, 2]}]},
                    {
                        "layers": [3, 5],
                        "shards": [
                            {"rank": "i1-0", "instance": "i1", "head_groups": [0, 0]},
                            {"rank": "i2-0", "instance": "i2", "head_groups": [1, 2]},
                        ],
                    },
                ],
                "running": 5,
            }
        ],
        "requests": {"running": 5, "waiting": 2},
        "planner": {"advisory": False, "failed_decisions": 0, "last_failure": "", "desired": None},
    }


def test_a_retiring_pipeline_is_listed_while_it_serves() -> None:
    assert STATUS.plan is not None
    gone = msgspec.structs.replace(PIPELINE, id="p1")
    retiring = [Retiring(pipeline=gone, reason="notice")]
    plan = msgspec.structs.replace(STATUS.plan, retiring=retiring)
    status = msgspec.structs.replace(STATUS, plan=plan)
    serving = status_report(status, RequestCounts(running=1, waiting=0, pipelines={"p1": 1}))
    assert [pipeline.id for pipeline in serving.pipelines] == ["p3", "p1"]
    assert [pipeline.id for pipeline in status_report(status, COUNTS).pipelines] == ["p3"]


def test_status_without_plan_and_gateway_says_so() -> None:
    report = status_report(Status(epoch=0, instances=[], plan=None), None)
    assert json.loads(msgspec.json.encode(report)) == {
        "epoch": 0,
        "instances": [],
        "pipelines": [],
        "requests": {"running": None, "waiting": None},
        "planner": {"advisory": False, "failed_decisions": 0, "last_failure": "", "desired": None},
    }
    shown = rendered(status_tables(report, now_s=0.0))
    assert "the gateway does not answer" in shown
    assert "no pipeline: requests wait" in shown


def test_status_tables_count_down_to_the_deadline() -> None:
    shown = rendered(status_tables(status_report(STATUS, COUNTS), now_s=1000.0))
    lines = {line.split()[0]: line for line in shown.splitlines() if line.split()}
    assert "epoch 7, 5 running, 2 waiting" in shown
    assert "12 s" in lines["i3"]
    assert "s" not in lines["i4"].replace("spot", "").replace("lost", "")  # it is gone: nothing to count
    assert "0-2" in lines["p3"]
    assert "i1-0 (0), i2-0 (1-2)" in shown


def test_plan_shows_choice_alternatives_and_history() -> None:
    shown = rendered(plan_tables(STATUS))
    assert "plan 7: 1 pipeline of 2 stages, tensor degree 1, up to 8 sequences each" in shown
    assert "1.2 GB moved, 2.5 MB reused in place" in shown
    assert "about 125 ms" in shown
    assert "250 ms after the cause" in shown
    assert "chosen: lowest latency" in shown
    assert shown.count("preemption notice of i3") == 2  # the plan's cause, and its row of the history
    assert "i3 leaves in 30 s" in shown
    assert "no plan yet" in rendered(plan_tables(Status(epoch=0, instances=[], plan=None)))


def test_plan_json_has_the_explanation_and_no_counts() -> None:
    report = json.loads(msgspec.json.encode(plan_report(STATUS)))
    assert set(report) == {"epoch", "pipelines", "retiring", "explanation", "history", "desired"}
    assert set(report["explanation"]) == set(Explanation.__struct_fields__), "also what has its default value"
    assert set(report["explanation"]["alternatives"][0]) == set(Alternative.__struct_fields__)
    assert report["explanation"]["cause"] == "preemption notice of i3"
    assert "running" not in report["pipelines"][0]


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (2_500_000, "2.5 MB"), (7e12, "7000.0 GB")]
)
def test_bytes_are_readable(num_bytes: float, text: str) -> None:
    assert describe_bytes(num_bytes) == text


def test_no_configuration_is_said() -> None:
    assert describe_config(None) == "nothing to run on"


def test_what_is_out_of_the_ordinary_is_said() -> None:
    desired = DesiredCapacity(spot=3, on_demand=1, reason="2 instances for 4.00 requests/s")
    status = msgspec.structs.replace(
        STATUS, advisory=True, num_failed_decisions=2, last_failure="ValueError: no", desired=desired
    )
    report = status_report(status, COUNTS)
    shown = rendered(status_tables(report, now_s=0.0))
    assert "advisory: only what keeps the fleet serving is carried out" in shown
    assert "could not decide (ValueError: no): the last plan stands" in shown
    assert "wanted: 3 spot, 1 on-demand (2 instances for 4.00 requests/s)" in shown
    planner = json.loads(msgspec.json.encode(report))["planner"]
    assert planner["failed_decisions"] == 2
    assert planner["desired"]["release"] == []
    assert "advisory" not in rendered(status_tables(status_report(STATUS, COUNTS), now_s=0.0))


def test_plan_shows_inputs_costs_and_moves() -> None:
    assert STATUS.plan is not None
    other = ParallelConfig(data=1, pipeline=3, tensor=1, max_batch=8)
    lost = Alternative(
        config=other,
        others=[CONFIG],
        latency_s=2.5,
        throughput_per_s=3.0,
        num_ranks=5,
        verdict="slower",
        usd_per_h=1.25,
        bytes_moved=7_000_000,
        pause_s=0.25,
    )
    explanation = msgspec.structs.replace(
        EXPLANATION,
        alternatives=[*EXPLANATION.alternatives, lost],
        others=[other],
        prompt_tokens=300.0,
        output_tokens=80.0,
        objective="latency",
        expected_calm_s=600.0,
    )
    status = msgspec.structs.replace(STATUS, plan=msgspec.structs.replace(STATUS.plan, explanation=explanation))
    shown = rendered(plan_tables(status))
    assert "1.50 requests/s on 3 rank(s), 300 prompt and 80 output tokens each" in shown
    assert "latency; the next event is expected in 10 min" in shown
    assert "plan 7: 1 pipeline of 2 stages, tensor degree 1, up to 8 sequences each, and 1 pipeline of 3" in shown
    row = next(line for line in shown.splitlines() if "slower" in line)
    assert row.split() == [
        "1x3x1",
        "+",
        "1x2x1",
        "8",
        "5",
        "2.50",
        "s",
        "3.00/s",
        "1.25",
        "7.0",
        "MB",
        "250",
        "ms",
        "slower",
    ]
    assert "USD/h" not in rendered(plan_tables(STATUS)), "nothing is known of prices there"


def test_advice_and_history() -> None:
    advice = msgspec.structs.replace(EXPLANATION, cause="i9 joined", advisory=True)
    status = msgspec.structs.replace(STATUS, history=[advice, EXPLANATION])
    shown = rendered(plan_tables(status))
    assert "advice that nothing acts on: 1 pipeline of 2 stages" in shown
    assert "advice: 1 pipeline" in shown
    last = rendered(history_tables(status, 1))
    assert "i9 joined" in last
    assert "preemption notice of i3" not in last
    assert rendered(history_tables(status, 5)).count("chosen: lowest latency") == 2
    assert len(plan_report(status, 1)["history"]) == 1
    assert len(plan_report(status)["history"]) == 2
    assert "no decision yet" in rendered(history_tables(Status(epoch=0, instances=[], plan=None), 3))
