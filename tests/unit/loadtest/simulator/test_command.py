"""The command as a user gives it: tables, files that are the same every time, and one line for what is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner, Result

from loadtest.errors import SimulationError
from loadtest.simulator.command import app
from loadtest.simulator.policies import POLICIES
from loadtest.simulator.policies.base import OnProgress, Policy
from loadtest.simulator.policies.on_demand import OnDemand
from loadtest.simulator.policies.replicas import Replicas
from loadtest.simulator.policies.spotserve import SpotServe
from loadtest.simulator.result import Result as SimulationResult
from loadtest.simulator.runs import as_json, run_all
from loadtest.simulator.scenario import Scenario
from loadtest.simulator.setup import Options, build

TRACE = """time_s,event,instance,market
0,add,a,spot
0,add,b,spot
120,remove,a,
180,add,c,spot
240,end,,
"""


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "short.csv"
    path.write_text(TRACE)
    return path


def simulate(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def small(trace: Path, *more: str | Path) -> list[str | Path]:
    fixed: list[str | Path] = [
        "--model",
        "llama-3.1-8b",
        "--device",
        "L4",
        "--trace",
        trace,
        "--arrivals",
        "poisson:0.1",
    ]
    return [*fixed, "--lengths", "128,16", *more]


def read(path: Path) -> Any:
    return msgspec.json.decode(path.read_bytes())


def test_run_compares_policies(trace: Path, tmp_path: Path):
    json_file = tmp_path / "run.json"
    done = simulate("run", *small(trace, "--policies", "spotserve,on-demand", "--json", json_file))
    assert done.exit_code == 0, done.output
    assert "Beside on-demand (" in done.stdout
    content = read(json_file)
    assert [policy["summary"]["policy"] for policy in content["policies"]] == ["spotserve", "on-demand"]
    num = {fact["name"]: fact["value"] for fact in content["assumptions"]}["arrivals"]
    for policy in content["policies"]:
        summary = policy["summary"]
        fates = summary["num_completed"] + summary["num_unfinished"] + summary["num_lost"]
        assert num == f"poisson:0.1: {fates} requests"
    assert content["policies"][1]["instance_hours_spot"] == 0
    assert content["expected"][0]["instances"] == 1


def test_what_if_gives_a_verdict_and_a_report(trace: Path, tmp_path: Path):
    html_file = tmp_path / "what-if.html"
    done = simulate("what-if", *small(trace, "--policies", "spotserve", "--html", html_file))
    assert done.exit_code == 0, done.output
    assert "llama-3.1-8b needs at least 1 GPU (1 instance)" in done.stdout
    assert "spotserve completes" in done.stdout
    text = html_file.read_text()
    assert "llama-3.1-8b on short" in text
    for chart in ("latency-curves", "latency-over-time", "cost", "fleet", "configuration", "pauses"):
        assert f'<div id="{chart}"' in text
    assert "list price" in text


def test_the_same_command_writes_the_same_bytes(trace: Path, tmp_path: Path):
    written = []
    for name in ("first", "second"):
        files = tmp_path / f"{name}.json", tmp_path / f"{name}.html"
        done = simulate("what-if", *small(trace, "--seed", "5", "--json", files[0], "--html", files[1]))
        assert done.exit_code == 0, done.output
        written.append([path.read_bytes() for path in files])
    assert written[0] == written[1]


BAD: dict[str, tuple[list[str], str]] = {
    "policy": (["--policies", "spotserve,magic"], f"'magic' is not known; there are {', '.join(POLICIES)}"),
    "policy twice": (["--policies", "replicas,replicas"], "names a policy twice"),
    "device": (["--device", "abacus"], "--device: 'abacus' is not known; there are T4,"),
    "impossible fleet": (["--memory-gib", "1.5"], "llama-3.1-8b fits on no fleet of this trace"),
    "negative rate": (["--arrivals", "gamma:-1,2"], "--arrivals: '-1,2' has a number that is negative"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exit_code_2(trace: Path, name: str):
    words, message = BAD[name]
    done = simulate("what-if", *small(trace), *words)
    assert done.exit_code == 2
    assert done.stderr.startswith("spotserve simulate: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


class Impossible:
    name = "impossible"

    def run(self, scenario: Scenario, on_progress: OnProgress) -> SimulationResult:
        raise SimulationError("no room")


def test_a_policy_that_cannot_run_does_not_hide_the_others(trace: Path):
    setup = build(Options(model="llama-3.1-8b", device="L4", trace=str(trace), arrivals="poisson:0.1"))
    results, failures = run_all(setup.scenario, [Impossible(), OnDemand()])
    assert [result.policy for result in results] == ["on-demand"]
    assert failures == ["impossible cannot run here: no room."]
    with pytest.raises(SimulationError, match="impossible cannot run here"):
        run_all(setup.scenario, [Impossible()])


def test_processes_change_nothing_but_the_time(trace: Path):
    setup = build(Options(model="llama-3.1-8b", device="L4", trace=str(trace), arrivals="poisson:0.5"))
    policies: list[Policy] = [SpotServe(), Replicas(), OnDemand()]
    alone, beside = (run_all(setup.scenario, policies, num) for num in (1, 2))
    assert as_json(beside) == as_json(alone)
    assert [result.policy for result in beside[0]] == ["spotserve", "replicas", "on-demand"]


def test_a_report_that_cannot_be_written_is_one_line(trace: Path, tmp_path: Path):
    nowhere = tmp_path / "no" / "such" / "x.json"
    done = simulate("what-if", *small(trace, "--policies", "on-demand", "--json", nowhere))
    assert done.exit_code == 2
    assert f"No such file or directory: '{nowhere}'" in done.stderr


def test_spotserve_simulate_passes_its_arguments_on(trace: Path):
    command = [sys.executable, "-m", "deploy", "simulate", "what-if", *small(trace, "--policies", "on-demand")]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "on-demand completes all" in done.stdout
    bad = subprocess.run(
        [*map(str, command[:5]), "--seed", "-1"], capture_output=True, text=True, timeout=60, check=False
    )
    assert bad.returncode == 2
