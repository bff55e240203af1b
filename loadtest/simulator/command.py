"""`spotserve simulate`: run policies on a trace, ask what a model would cost, reproduce the paper's figures."""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import typer

from engine.errors import EngineError
from loadtest.errors import BenchError
from loadtest.simulator.metrics import summarize
from loadtest.simulator.policies import POLICIES
from loadtest.simulator.policies.step_times import cost_model
from loadtest.simulator.report import render
from loadtest.simulator.reproduction_page import reproduction_page, shown_tables
from loadtest.simulator.runs import Report, as_json, figures_of, policies_of, reproduce_with_bar, run_all
from loadtest.simulator.setup import TRACES, Options, build
from loadtest.simulator.tables import costs_table, fleet_table, requests_table
from loadtest.simulator.verdict import of_fleet, of_policies
from loadtest.simulator.what_if import fleet_rows
from planner.core.config_optimizer import Targets
from planner.core.devices import DEVICES
from planner.errors import PlannerError

EXIT_ERROR: Final = 2
RUN_POLICIES: Final = ",".join(POLICIES)
WHAT_IF_POLICIES: Final = "spotserve,replicas,on-demand"

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Capacity traces in virtual time, with the planner's own decisions: nothing is rented or started.",
)

ModelOption = Annotated[
    str, typer.Option(help="A Hugging Face config.json (or its directory), or a preset: llama-3.1-8b, qwen3-32b, ...")
]
DeviceOption = Annotated[str, typer.Option(help=f"One of {', '.join(DEVICES)}.")]
TraceOption = Annotated[
    str, typer.Option(help=f"A CSV or artifact file, or an example: {', '.join(TRACES)}.", show_default=True)
]
ArrivalsOption = Annotated[
    str | None,
    typer.Option(
        help="poisson:RATE, gamma:RATE,CV, rates:FILE (requests/s of each minute), or a file of the artifact.",
        show_default="poisson, 60 % of what the median fleet can serve",
    ),
]
LengthsOption = Annotated[str, typer.Option(help="PROMPT,OUTPUT: mean tokens of a request.")]
LengthsCvOption = Annotated[
    float, typer.Option(help="Their coefficient of variation (log-normal); 0: all are the same.", min=0)
]
ProfileOption = Annotated[
    Path | None,
    typer.Option(help="Measured step times: our JSON or the artifact's.", show_default="a roofline estimate"),
]
PoliciesOption = Annotated[str, typer.Option(help="Names, separated by commas.")]
DtypeOption = Annotated[
    str | None,
    typer.Option(help="Of weights and KV: bfloat16, float16 or float32.", show_default="bfloat16 if the device can"),
]
MaxModelLenOption = Annotated[
    int | None, typer.Option(help="Longest sequence to serve, in tokens.", min=1, show_default="4096, or the requests'")
]
RanksOption = Annotated[
    int | None, typer.Option(help="GPUs of an instance.", min=1, show_default="the instance type's")
]
MemoryOption = Annotated[
    float | None, typer.Option("--memory-gib", help="Usable memory of a GPU.", min=0.001, show_default="90 % of it")
]
MaxBatchOption = Annotated[int, typer.Option(help="Sequences that a pipeline decodes at once.", min=1)]
NoticeOption = Annotated[float, typer.Option("--notice", help="Seconds from a preemption notice to the end.", min=0)]
AcquisitionOption = Annotated[
    float, typer.Option("--acquisition", help="Seconds until a requested instance is usable.", min=0)
]
PricesOption = Annotated[
    str | None, typer.Option(help="SPOT,ON_DEMAND: USD an hour of an instance.", show_default="list prices")
]
DrainOption = Annotated[
    float | None,
    typer.Option(
        "--drain", help="Seconds after the trace in which the last requests may finish.", min=0, show_default="no limit"
    ),
]
SeedOption = Annotated[int, typer.Option(help="Of everything that is drawn.", min=0)]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")]
HtmlOption = Annotated[Path | None, typer.Option("--html", help="Write a report with plots to this file.")]


def _example(*lines: str) -> str:
    return "Examples:\n\n" + "\n\n".join(f"`{line}`" for line in lines)


@app.command(
    epilog=_example(
        "spotserve simulate run --model llama-3.1-8b --device L4 --trace churn --arrivals poisson:2 --html report.html",
        "spotserve simulate run --model ./config.json --device T4 --trace my.csv --arrivals gamma:0.5,6 "
        "--policies spotserve,replicas",
    )
)
def run(
    model: ModelOption,
    device: DeviceOption,
    trace: TraceOption = "churn",
    arrivals: ArrivalsOption = None,
    lengths: LengthsOption = "512,128",
    lengths_cv: LengthsCvOption = 0.0,
    profile: ProfileOption = None,
    policies: PoliciesOption = RUN_POLICIES,
    dtype: DtypeOption = None,
    max_model_len: MaxModelLenOption = None,
    ranks_per_instance: RanksOption = None,
    memory_gib: MemoryOption = None,
    max_batch: MaxBatchOption = 16,
    notice_s: NoticeOption = 30.0,
    acquisition_s: AcquisitionOption = 120.0,
    prices: PricesOption = None,
    drain_s: DrainOption = None,
    seed: SeedOption = 0,
    json_file: JsonOption = None,
    html_file: HtmlOption = None,
) -> None:
    """Run policies on the same trace and the same requests, and compare them."""
    given = locals()
    with _one_line_errors():
        _simulate(_options(given), policies, json_file, html_file)


@app.command(
    "what-if",
    epilog=_example(
        "spotserve simulate what-if --model llama-3.1-8b --device L4",
        "spotserve simulate what-if --model ./config.json --device H100 --trace my.csv --arrivals poisson:20 "
        "--lengths 1500,300 --html what-if.html",
    ),
)
def what_if(
    model: ModelOption,
    device: DeviceOption,
    trace: TraceOption = "churn",
    arrivals: ArrivalsOption = None,
    lengths: LengthsOption = "512,128",
    lengths_cv: LengthsCvOption = 0.5,
    profile: ProfileOption = None,
    policies: PoliciesOption = WHAT_IF_POLICIES,
    dtype: DtypeOption = None,
    max_model_len: MaxModelLenOption = None,
    ranks_per_instance: RanksOption = None,
    memory_gib: MemoryOption = None,
    max_batch: MaxBatchOption = 16,
    notice_s: NoticeOption = 120.0,
    acquisition_s: AcquisitionOption = 120.0,
    prices: PricesOption = None,
    drain_s: DrainOption = None,
    seed: SeedOption = 0,
    json_file: JsonOption = None,
    html_file: HtmlOption = None,
) -> None:
    """What would this model cost on this spot trace, and how would it behave? Before anything is rented."""
    given = locals()
    with _one_line_errors():
        _simulate(_options(given), policies, json_file, html_file)


@app.command(
    epilog=_example(
        "spotserve simulate reproduce --data ./spotserve-data",
        "spotserve simulate reproduce --data ./spotserve-data --figures 6,9 --html reproduction.html",
    )
)
def reproduce(
    data: Annotated[Path, typer.Option(help="Directory with the artifact's traces, queries and profiles.")],
    figures: Annotated[str, typer.Option(help="Those of the paper to show; all are computed.")] = "6,7,8,9",
    processes: Annotated[int, typer.Option(help="Simulations at the same time.", min=1)] = os.cpu_count() or 1,
    json_file: JsonOption = None,
    html_file: HtmlOption = None,
) -> None:
    """The figures of the SpotServe paper again, beside what it prints, and our own policy beside its systems."""
    with _one_line_errors():
        chosen = figures_of(figures)
        reproduction = reproduce_with_bar(data, processes)
        notes = [f"- {note}" for note in reproduction.notes]
        shown = [
            *map(str, shown_tables(reproduction, chosen)),
            "\n".join(notes),
            "\n".join(map(str, reproduction.checks)),
        ]
        print("\n\n".join(shown))
        if json_file is not None:
            _write(json_file, as_json({"command": _command_line(), **msgspec.structs.asdict(reproduction)}))
        if html_file is not None:
            _write(html_file, render(reproduction_page(reproduction, chosen, _command_line())).encode())


def _options(given: Mapping[str, Any]) -> Options:
    """Of a command's arguments those that make the scenario."""
    fields = {name: given[name] for name in Options.__struct_fields__}
    return Options(**{**fields, "drain_s": math.inf if given["drain_s"] is None else given["drain_s"]})


def _simulate(options: Options, policies: str, json_file: Path | None, html_file: Path | None) -> None:
    chosen = policies_of(policies)
    setup = build(options)
    costs = cost_model(setup.scenario)
    rows = fleet_rows(
        costs,
        Targets(max_batch=options.max_batch),
        setup.scenario.trace,
        setup.scenario.ranks_per_instance,
        setup.scenario.prices,
    )
    print(f"{fleet_table(rows)}\n", flush=True)
    results, failures = run_all(setup.scenario, chosen)
    summaries = [summarize(result, setup.scenario) for result in results]
    print(f"{requests_table(summaries)}\n\n{costs_table(summaries, results)}\n")
    verdict = [
        *of_fleet(setup.fit, rows, setup.scenario, costs.workload.arrivals_per_s),
        *of_policies(summaries),
        *failures,
    ]
    print("\n".join(verdict))
    report = Report(
        setup=setup, fleet=rows, results=results, summaries=summaries, verdict=verdict, command=_command_line()
    )
    if json_file is not None:
        _write(json_file, report.as_json())
    if html_file is not None:
        _write(html_file, render(report.as_page()).encode())


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    print(f"written: {path}", file=sys.stderr)


def _command_line() -> str:
    """What was typed, but for the files that it writes: they are the same wherever they lie."""
    words, kept = iter(sys.argv[1:]), []
    for word in words:
        if word in ("--json", "--html"):
            next(words, None)
        elif not word.startswith(("--json=", "--html=")):
            kept.append(shlex.quote(word))
    return " ".join(["spotserve", *kept])


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """What the user can put right ends the program with one line and exit status 2."""
    try:
        yield
    except (BenchError, PlannerError, EngineError, OSError) as error:
        print(f"spotserve simulate: {error}", file=sys.stderr)
        raise typer.Exit(EXIT_ERROR) from error
