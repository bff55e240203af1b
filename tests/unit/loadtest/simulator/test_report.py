"""The page of a simulation: what is in it, that it needs no network, and that it is the same every time."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from typing import Any

import msgspec
import pytest

from loadtest.report import Table
from loadtest.simulator import charts
from loadtest.simulator.metrics import percentiles
from loadtest.simulator.report import Page, Section, render
from loadtest.simulator.result import Fate, FleetSample, Outcome, Pause, Result
from loadtest.simulator.scenario import CapacityEvent, CapacityTrace

TRACE = CapacityTrace(
    name="two events",
    events=(
        CapacityEvent(at_s=0, added=("i0", "i1", "i2")),
        CapacityEvent(at_s=40, removed=("i1",)),
        CapacityEvent(at_s=70, added=("i3",)),
    ),
    end_s=100,
)


def outcome(number: int, latency_s: float, fate: Fate = Fate.COMPLETED) -> Outcome:
    return Outcome(
        id=number,
        fate=fate,
        arrival_s=float(number),
        ended_s=number + latency_s,
        first_token_s=number + 0.5,
        prompt_tokens=10,
        tokens_done=5,
    )


def result(policy: str = "spotserve", outcomes: tuple[Outcome, ...] | None = None) -> Result:
    return Result(
        policy=policy,
        scenario="small",
        outcomes=tuple(outcome(n, 1.0 + n) for n in range(100)) if outcomes is None else outcomes,
        fleet=(
            FleetSample(at_s=0, num_spot=3, num_on_demand=0, shapes=((3, 2), (3, 2)), num_ranks_used=12),
            FleetSample(at_s=20, num_spot=3, num_on_demand=0, shapes=((3, 2), (3, 2)), num_ranks_used=12),
            FleetSample(at_s=40, num_spot=2, num_on_demand=1, shapes=(), num_ranks_used=0),
            FleetSample(at_s=55, num_spot=2, num_on_demand=1, shapes=((2, 2), (3, 2)), num_ranks_used=10),
        ),
        pauses=(
            Pause(at_s=40, cause="notice of i1 <b>", pause_s=1.25, moved_bytes=2_000_000_000, tokens_recomputed=7),
        ),
        cost_usd=1.0,
        instance_hours_spot=1.0,
        instance_hours_on_demand=0.1,
        end_s=100,
    )


def page(*shown: charts.Chart) -> Page:
    table = Table("Summary", ["policy", "P99 (s)"], [["<spotserve>", "9.5"]])
    return Page(
        title="Model & trace",
        verdict=["It costs 2 USD.", "It holds < 3 s."],
        sections=[Section(title="Results", paragraphs=["all of it"], tables=[table], charts=list(shown))],
        command="spotserve simulate run --seed 1",
    )


class Elements(HTMLParser):
    """Every element with its attributes, and all text outside scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        last = self.found[-1][0] if self.found else ""
        if last == "script" and data.strip():
            self.scripts.append(data)
        elif last not in ("style", "script") and data.strip():
            self.text.append(data.strip())


def drawn(elements: Elements) -> list[dict[str, Any]]:
    found = re.match(r"const charts = (.*);\nconst draw", elements.scripts[-1], re.DOTALL)
    assert found is not None
    charts_drawn: list[dict[str, Any]] = msgspec.json.decode(found[1].replace("<\\/", "</"))
    return charts_drawn


def test_page_has_verdict_tables_charts_and_command():
    elements = Elements(render(page(charts.pauses([result()]))))
    assert {"Model & trace", "It costs 2 USD.", "It holds < 3 s.", "all of it", "<spotserve>", "9.5"} <= set(
        elements.text
    )
    assert "spotserve simulate run --seed 1" in elements.text
    assert [chart["id"] for chart in drawn(elements)] == ["pauses"]
    assert ("div", {"id": "pauses", "style": "height: 380px"}) in elements.found


def test_page_opens_without_network():
    elements = Elements(render(page(charts.latency_curves([result()]))))
    assert not [tag for tag, attributes in elements.found if "src" in attributes or tag in ("link", "iframe", "img")]
    assert any("plotly.js" in script for script in elements.scripts)


def test_page_is_the_same_every_time():
    def once() -> str:
        results = [result("spotserve"), result("replicas")]
        return render(page(charts.latency_curves(results), charts.latency_over_time(results, TRACE)))

    assert once() == once()


def test_text_of_a_cause_cannot_end_the_script():
    bad = msgspec.structs.replace(result(), policy="</script><b>")
    elements = Elements(render(page(charts.pauses([bad]))))
    assert drawn(elements)[0]["data"][0]["name"] == "</script><b>"
    assert "b" not in [tag for tag, _ in elements.found]


def test_page_without_charts_carries_no_program():
    assert len(render(page())) < 10_000


def test_latency_curve_counts_as_the_summary_does():
    data = charts.latency_curves([result()]).data[0]
    at = dict(zip(data["text"], data["y"], strict=True))
    summary = percentiles([outcome.latency_s for outcome in result().outcomes])
    assert summary is not None
    assert (at["P50"], at["P90"], at["P99"]) == (summary.p50, summary.p90, summary.p99)
    assert data["text"][-1] == "P99"  # with 100 requests nothing can be said of P99.9
    assert data["x"] == sorted(data["x"])


def test_latency_curve_ends_where_requests_were_lost():
    outcomes = tuple(outcome(n, 2.0, Fate.LOST if n >= 80 else Fate.COMPLETED) for n in range(100))
    data = charts.latency_curves([result(outcomes=outcomes)]).data[0]
    at = dict(zip(data["text"], data["y"], strict=True))
    assert at["P79"] == 2.0
    assert at["P80"] is None


def test_unfinished_requests_are_shown_apart():
    outcomes = (outcome(0, 2.0), outcome(1, 50.0, Fate.UNFINISHED))
    data = charts.latency_over_time([result(outcomes=outcomes)], TRACE).data
    assert [trace["y"] for trace in data] == [[2.0], [50.0]]


def test_many_requests_are_thinned_out_but_the_slowest_stays():
    outcomes = tuple(
        msgspec.structs.replace(outcome(n, 1.0), arrival_s=n / 100, ended_s=n / 100 + (99.0 if n == 4321 else 1.0))
        for n in range(10_000)
    )
    data = charts.latency_over_time([result(outcomes=outcomes)], TRACE).data[0]
    assert len(data["y"]) <= charts.MAX_POINTS
    assert max(data["y"]) == 99.0


def test_trace_events_are_marked():
    shapes = charts.latency_over_time([result()], TRACE).layout["shapes"]
    assert [(shape["x0"], shape["line"]["color"]) for shape in shapes] == [(40, "#c0392b"), (70, "#27ae60")]


def test_configuration_joins_what_did_not_change():
    data = charts.configuration_over_time([result()]).data[0]
    assert data["text"] == ["2xP3T2", "nothing", "1xP3T2 + 1xP2T2"]
    assert list(zip(data["base"], data["x"], strict=True)) == [(0, 40), (40, 15), (55, 45)]


def test_fleet_goes_on_until_the_end():
    spot, on_demand, at_work = charts.fleet_over_time([result()], ranks_per_instance=4).data
    assert spot["x"] == [0, 20, 40, 55, 100]
    assert spot["y"] == [3, 3, 2, 2, 2]
    assert on_demand["y"] == [0, 0, 1, 1, 1]
    assert at_work["y"] == [3, 3, 0, 2.5, 2.5]


def test_cost_without_figures_leaves_a_gap():
    point = charts.CostPoint(policy="replicas", usd_per_million_tokens=None, mean_s=2.0, p99_s=math.inf)
    data = charts.cost_against_latency([point]).data[0]
    assert (data["x"], data["y"]) == ([None, None], [2.0, None])


@pytest.mark.parametrize("policies", [["a", "b"], ["b", "a", "spotserve"]])
def test_policies_have_colours_of_their_own(policies: list[str]):
    colors = [charts.color_of(policy, policies) for policy in policies]
    assert len(set(colors)) == len(policies)


def test_charts_of_nothing():
    nothing = msgspec.structs.replace(result(), outcomes=(), fleet=(), pauses=())
    shown = [
        charts.latency_curves([nothing]),
        charts.latency_over_time([nothing], TRACE),
        charts.fleet_over_time([nothing], 4),
        charts.configuration_over_time([nothing]),
        charts.pauses([nothing]),
    ]
    assert "Results" in render(page(*shown))
