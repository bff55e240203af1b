"""`python -m loadtest`: the benchmarks. Each starts what it needs, ends by itself and leaves nothing behind."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Final

import typer

from deploy.default_model import cache_dir, default_model_dir
from loadtest import decision_bench, gateway_bench, memory_bench, pause_bench, startup_bench, tool_bench
from loadtest.errors import BenchError
from loadtest.gateway_bench import GatewayOptions
from loadtest.pause_bench import PauseOptions
from loadtest.report import Machine, Report, write_json
from loadtest.simulator import command

STAGES: Final = 3
EXIT_ERROR: Final = 1

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Speed and pause figures of this machine, beside their targets. Without a command: all of them, "
    "which takes about a quarter of an hour. Close other programs first.",
)

app.add_typer(command.app, name="simulate")

JsonOption = Annotated[Path | None, typer.Option("--json", help="Write all figures and the command to this file.")]
ModelOption = Annotated[str | None, typer.Option(help="As of `spotserve up`: a directory or hub id.")]
DtypeOption = Annotated[str | None, typer.Option(help="As of `spotserve up`; its default is chosen by the hardware.")]


def _example(*lines: str) -> str:
    return "Examples:\n\n" + "\n\n".join(f"`{line}`" for line in lines)


@app.callback(invoke_without_command=True)
def default(context: typer.Context, json_file: JsonOption = None) -> None:  # noqa: D103  a docstring would replace the app's help
    if context.invoked_subcommand is None:
        everything(json_file=json_file)


@app.command("all", epilog=_example("python -m loadtest", "python -m loadtest all --events 12 --json figures.json"))
def everything(
    events: Annotated[int, typer.Option(help="Preemptions, and kills, of `pause`.", min=1)] = 6,
    stage_events: Annotated[int, typer.Option(help="The same, of one pipeline of three stages.", min=1)] = 3,
    runs: Annotated[int, typer.Option(help="Starts of `startup`.", min=1)] = 3,
    json_file: JsonOption = None,
) -> None:
    """Every benchmark, one after the other."""
    _run(
        [
            lambda: _decode(None, "bfloat16", 1, [1, 8], 3),
            lambda: pause_bench.run(PauseOptions(num_events=events)),
            lambda: pause_bench.run(PauseOptions(num_events=stage_events, num_stages=STAGES)),
            lambda: startup_bench.run([], runs),
            lambda: memory_bench.run([], pause_bench.NUM_INSTANCES),
            lambda: decision_bench.run(list(decision_bench.TARGETS_S), 3),
            lambda: gateway_bench.run(GatewayOptions(model=_default_model())),
            lambda: tool_bench.run([], list(tool_bench.TOOLS)),
        ],
        json_file,
    )


@app.command(epilog=_example("python -m loadtest decode", "python -m loadtest decode --streams 1 --dtype float32"))
def decode(
    model: Annotated[
        str | None, typer.Option(help="A Hugging Face directory.", show_default="the default model")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "bfloat16",
    threads: Annotated[int, typer.Option(help="Compute threads.", min=1)] = 1,
    streams: Annotated[list[int] | None, typer.Option(help="Streams at once; repeat it.", show_default="1, 8")] = None,
    rounds: Annotated[int, typer.Option(help="Rounds; the best one counts.", min=1)] = 3,
    json_file: JsonOption = None,
) -> None:
    """Tokens per second beside `transformers` generate, same weights, dtype and threads."""
    _run([lambda: _decode(model, dtype, threads, streams or [1, 8], rounds)], json_file)


@app.command(
    epilog=_example(
        "python -m loadtest pause --events 12 --json pause.json",
        "python -m loadtest pause --stages 3 --events 3",
        "python -m loadtest pause --notice 30 --dtype float32",
    )
)
def pause(
    events: Annotated[int, typer.Option(help="Preemptions, and as many kills.", min=1)] = 6,
    notice: Annotated[float, typer.Option(help="Seconds from a notice to the end.", min=0)] = 5.0,
    stages: Annotated[int, typer.Option(help="1: three pipelines of one stage. 3: one pipeline of three.")] = 1,
    streams: Annotated[int, typer.Option(help="Streams that run all the time.", min=1)] = 6,
    prompt_tokens: Annotated[int, typer.Option(help="Length of each prompt.", min=1)] = 64,
    tokens: Annotated[int, typer.Option(help="Tokens of each stream; then it begins again.", min=1)] = 256,
    model: ModelOption = None,
    dtype: DtypeOption = None,
    json_file: JsonOption = None,
) -> None:
    """How long streams pause when an instance is preempted or killed, and where the time goes."""
    if stages not in (1, STAGES):
        raise typer.BadParameter(f"{stages} is not 1 or {STAGES}", param_hint="--stages")
    options = PauseOptions(
        up_options=_up_options(model, dtype),
        num_stages=stages,
        num_events=events,
        notice_s=notice,
        num_streams=streams,
        num_prompt_tokens=prompt_tokens,
        num_tokens=tokens,
    )
    _run([lambda: pause_bench.run(options)], json_file)


@app.command(epilog=_example("python -m loadtest startup", "python -m loadtest startup --runs 1 --dtype float32"))
def startup(
    runs: Annotated[int, typer.Option(help="Starts.", min=1)] = 3,
    model: ModelOption = None,
    dtype: DtypeOption = None,
    json_file: JsonOption = None,
) -> None:
    """Seconds from `spotserve up` to the first streamed token, with everything cached."""
    _run([lambda: startup_bench.run(_up_options(model, dtype), runs)], json_file)


@app.command(epilog=_example("python -m loadtest memory", "python -m loadtest memory --instances 1"))
def memory(
    instances: Annotated[int, typer.Option(help="Instances of one rank each.", min=1)] = pause_bench.NUM_INSTANCES,
    model: ModelOption = None,
    dtype: DtypeOption = None,
    json_file: JsonOption = None,
) -> None:
    """What a rank uses beside its share of weights and KV."""
    _run([lambda: memory_bench.run(_up_options(model, dtype), instances)], json_file)


@app.command(epilog=_example("python -m loadtest decisions", "python -m loadtest decisions --ranks 48 --ranks 96"))
def decisions(
    ranks: Annotated[
        list[int] | None, typer.Option(help="Size of a fleet; repeat it.", min=16, show_default="48, 256, 1024, 4096")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Decisions of each kind; the median counts.", min=1)] = 3,
    json_file: JsonOption = None,
) -> None:
    """How long the planner takes to decide about fleets of up to thousands of ranks."""
    _run([lambda: decision_bench.run(sorted(set(ranks or decision_bench.TARGETS_S)), rounds)], json_file)


@app.command(
    epilog=_example("python -m loadtest gateway", "python -m loadtest gateway --no-litellm --window 3 --streams 200")
)
def gateway(
    window: Annotated[float, typer.Option(help="Seconds of each measurement.", min=0.5)] = 8.0,
    connections: Annotated[
        int, typer.Option(help="Clients that ask again as soon as they have an answer.", min=1)
    ] = 32,
    streams: Annotated[int, typer.Option(help="Streams of the test with many at once.", min=1)] = 1000,
    litellm: Annotated[bool, typer.Option(help="LiteLLM's proxy beside it; installed once if need be.")] = True,
    model: Annotated[
        Path | None,
        typer.Option(help="Directory with a tokenizer and chat template.", show_default="the default model"),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """What the gateway alone can do, in front of a scripted engine and beside LiteLLM's proxy."""
    options = GatewayOptions(
        model=model or _default_model(),
        window_s=window,
        num_connections=connections,
        num_streams=streams,
        with_litellm=litellm,
    )
    _run([lambda: gateway_bench.run(options)], json_file)


@app.command(epilog=_example("python -m loadtest tools", "python -m loadtest tools --tool vllm --tool guidellm"))
def tools(
    tool: Annotated[
        list[str] | None, typer.Option(help=f"Repeat it: {', '.join(tool_bench.TOOLS)}.", show_default="all")
    ] = None,
    dtype: DtypeOption = None,
    json_file: JsonOption = None,
) -> None:
    """Whether load tools of others run unmodified: guidellm, aiperf, and what `vllm bench serve` sends."""
    chosen = tool or list(tool_bench.TOOLS)
    unknown = set(chosen) - tool_bench.TOOLS.keys()
    if unknown:
        raise typer.BadParameter(f"{min(unknown)} is not one of {', '.join(tool_bench.TOOLS)}", param_hint="--tool")
    _run([lambda: tool_bench.run(_up_options(None, dtype), chosen)], json_file)


def _default_model() -> Path:
    return default_model_dir(cache_dir(os.environ))


def _decode(model: str | None, dtype: str, threads: int, streams: list[int], rounds: int) -> Report:
    from loadtest import decode_bench  # torch: the other benchmarks do without it

    options = decode_bench.DecodeOptions(
        model=model, dtype=dtype, num_threads=threads, streams=tuple(streams), num_rounds=rounds
    )
    return decode_bench.run(options)


def _up_options(model: str | None, dtype: str | None) -> list[str]:
    given = {"--model": model, "--dtype": dtype}
    return [word for name, value in given.items() if value is not None for word in (name, value)]


def _run(benchmarks: list[Callable[[], Report]], json_file: Path | None) -> None:
    """Run them in turn, show each at once; the file is written also when a later one fails."""
    machine = Machine.inspect()
    print(f"{machine}\n")
    reports: list[Report] = []
    has_failed = False
    for benchmark in benchmarks:
        try:
            reports.append(benchmark())
        except BenchError as error:
            has_failed = True
            print(f"FAILED: {error}\n", file=sys.stderr)
            continue
        print(f"{reports[-1]}\n", flush=True)
        if json_file is not None:
            command = ["python", "-m", "loadtest", *map(shlex.quote, sys.argv[1:])]
            write_json(json_file, command, machine, reports)
    if has_failed or any(report.failure for report in reports):
        sys.exit(EXIT_ERROR)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that a running stack is stopped
    app()
