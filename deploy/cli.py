"""The command line `spotserve`: serve on this machine, look at the fleet, play the cloud, chat."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console

from deploy.bus import Command
from deploy.chat import Conversation, open_client
from deploy.client import RequestCounts, fetch_requests, fetch_status, send_command
from deploy.default_model import DEFAULT_MODEL, cache_dir
from deploy.doctor import examine, wants_model
from deploy.errors import CommandError, DeployError
from deploy.keys_cli import keys_app
from deploy.local import serve
from deploy.model_source import resolve_model
from deploy.protocol import AddCommand, CancelNoticeCommand, KillCommand, PreemptCommand
from deploy.report import plan_report, status_report
from deploy.settings import UpSettings, default_state_dir, restart_delay_s
from deploy.state import Running, StateDir
from deploy.tables import history_tables, plan_tables, status_tables
from planner.protocol import Market, Status

EXIT_ERROR = 2
API_KEY_VARIABLE = "SPOTSERVE_API_KEY"

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Serve a language model on preemptible instances, without clients noticing a preemption.\n\n"
    "`spotserve up` serves; the other commands talk to the running `up` from another terminal.",
)
model_app = typer.Typer(no_args_is_help=True, help="Models on this machine.")
app.add_typer(model_app, name="model")
app.add_typer(keys_app, name="keys")

StateDirOption = Annotated[
    Path | None,
    typer.Option("--state-dir", help="Where the `up` keeps its state.", show_default="~/.local/state/spotserve"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="As JSON, for programs.")]
InstanceArgument = Annotated[str, typer.Argument(help="Its id, as `spotserve status` shows it.")]


def _example(*lines: str) -> str:
    return "Examples:\n\n" + "\n\n".join(f"`{line}`" for line in lines)


def _say(line: str) -> None:
    print(line, flush=True)


@app.command(
    epilog=_example(
        "spotserve up",
        "spotserve up --port 8123 --instances 4",
        "spotserve up --model ./Qwen3-0.6B --dtype float32 --stages 2",
        "spotserve up --model Qwen/Qwen2.5-0.5B-Instruct --max-model-len 4096",
    )
)
def up(
    model: Annotated[
        str, typer.Option(help="A Hugging Face directory or hub id (Llama, Mistral, Qwen2, Qwen3).")
    ] = DEFAULT_MODEL,
    dtype: Annotated[
        str, typer.Option(help="auto, float32, bfloat16 or float16. auto: bfloat16 where the hardware has it.")
    ] = "auto",
    instances: Annotated[int, typer.Option(help="Instances to start with.")] = 3,
    ranks_per_instance: Annotated[int, typer.Option(help="Ranks (devices) of each instance.")] = 1,
    market: Annotated[Market, typer.Option(help="Market of the instances.")] = Market.SPOT,
    autoscale: Annotated[
        bool, typer.Option("--autoscale", help="Launch and release instances as the planner wants it for the load.")
    ] = False,
    max_instances: Annotated[int | None, typer.Option(help="With --autoscale: no more than these.")] = None,
    on_demand: Annotated[
        int | None, typer.Option(help="With --autoscale: so many of them may be on-demand, if spot is short.")
    ] = None,
    advisory: Annotated[
        bool,
        typer.Option(
            "--advisory",
            help="Carry out only what keeps the fleet serving (the first plan, notices, losses); explain the rest.",
        ),
    ] = False,
    host: Annotated[str, typer.Option(help="Address that the gateway listens on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port that the gateway listens on.")] = 8000,
    admin_port: Annotated[
        int | None, typer.Option(help="Port on 127.0.0.1 of metrics and health.", show_default="a free one")
    ] = None,
    gateway_workers: Annotated[int, typer.Option(help="Gateway processes that share the port.")] = 1,
    api_keys: Annotated[
        Path | None,
        typer.Option(help="File of the API keys.", show_default="api-keys.json in the state directory, if it is there"),
    ] = None,
    no_auth: Annotated[bool, typer.Option("--no-auth", help="Serve anybody, on any address, without keys.")] = False,
    tls_cert: Annotated[Path | None, typer.Option(help="PEM file of the certificate chain: HTTPS.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM file of its key.")] = None,
    nats_url: Annotated[
        str | None, typer.Option(help="An external NATS server with JetStream, in place of the embedded one.")
    ] = None,
    state_dir: StateDirOption = None,
    max_model_len: Annotated[int | None, typer.Option(help="Longest prompt and answer together, in tokens.")] = None,
    reduction: Annotated[
        str | None, typer.Option(help="fast, or fixed: bit-identical results for every shape and batch.")
    ] = None,
    pipelines: Annotated[
        int | None, typer.Option(help="Pipelines to aim for: this many, or the closest below.")
    ] = None,
    stages: Annotated[int | None, typer.Option(help="Stages of a pipeline to aim for.")] = None,
    tensor: Annotated[int | None, typer.Option(help="Tensor degree to aim for.")] = None,
    objective: Annotated[
        str | None, typer.Option(help="latency, throughput, or slo: --target-latency at the least cost.")
    ] = None,
    target_latency: Annotated[
        float | None, typer.Option(help="Seconds of a whole request, for --objective slo.")
    ] = None,
    max_batch: Annotated[int | None, typer.Option(help="Sequences that a pipeline decodes at once.")] = None,
    rank_memory_mb: Annotated[int | None, typer.Option(help="Weights and KV of one rank, in MiB.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    backend: Annotated[
        str,
        typer.Option(help="torch, or tensorrt_llm: one GPU a rank; `spotserve doctor` says whether it would work."),
    ] = "torch",
    keep_state: Annotated[
        bool, typer.Option("--keep-state", help="Go on with the JetStream store of the last `up`.")
    ] = False,
) -> None:
    """Serve a model on this machine: NATS, planner, gateway and instances, until Ctrl-C."""
    settings = UpSettings(
        state_dir=_state_dir(state_dir).path,
        cache_dir=cache_dir(os.environ),
        model=model,
        dtype=dtype,
        num_instances=instances,
        ranks_per_instance=ranks_per_instance,
        market=market,
        host=host,
        port=port,
        admin_port=admin_port,
        gateway_workers=gateway_workers,
        api_keys=_absolute(api_keys),
        no_auth=no_auth,
        tls_cert=_absolute(tls_cert),
        tls_key=_absolute(tls_key),
        nats_url=nats_url,
        max_model_len=max_model_len,
        reduction=reduction,
        pipelines=pipelines,
        stages=stages,
        tensor=tensor,
        objective=objective,
        target_latency_s=target_latency,
        advisory=advisory,
        autoscale=autoscale,
        max_instances=max_instances,
        max_on_demand=on_demand,
        max_batch=max_batch,
        rank_memory_mb=rank_memory_mb,
        device=device,
        backend=backend,
        keep_state=keep_state,
        restart_delay_s=restart_delay_s(os.environ),
    )
    serve(settings, os.environ, _say)


@app.command(
    epilog=_example(
        "spotserve doctor --backend tensorrt_llm", "spotserve doctor --backend tensorrt_llm --json report.json"
    )
)
def doctor(
    backend: Annotated[str, typer.Option(help="torch or tensorrt_llm.")] = "torch",
    model: Annotated[
        str | None,
        typer.Option(help="A small model to try it with.", show_default=f"tensorrt_llm with GPUs: {DEFAULT_MODEL}"),
    ] = None,
    report: Annotated[Path | None, typer.Option("--json", help="Write a report there, for programs.")] = None,
) -> None:
    """Whether a backend would work on this machine: versions, drivers, and how its engine behaves.

    One line a finding: ok, differs (it works, but not as expected), missing, failed or skipped. Exit code 0: all is
    well, 1: something is missing or failed, 3: something differs.
    """
    name = DEFAULT_MODEL if model is None and wants_model(backend) else model
    model_dir = resolve_model(name, cache_dir(os.environ), _say) if name is not None else None
    raise typer.Exit(examine(backend, model_dir, report))


@app.command(epilog=_example("spotserve status", "spotserve status --json"))
def status(as_json: JsonOption = False, state_dir: StateDirOption = None) -> None:
    """Instances, pipelines and requests of the running fleet."""
    running = _state_dir(state_dir).read_running()
    answer, requests = asyncio.run(_fetch_status_and_requests(running))
    report = status_report(answer, requests)
    if as_json:
        _print_json(report)
    else:
        Console().print(status_tables(report, time.time()))


async def _fetch_status_and_requests(running: Running) -> tuple[Status, RequestCounts | None]:
    requests: RequestCounts | None = None
    with contextlib.suppress(CommandError):  # the fleet's state is worth showing without the gateway's counts
        requests = await fetch_requests(running)
    return await fetch_status(running), requests


@app.command(epilog=_example("spotserve plan", "spotserve plan --json", "spotserve plan --history 3"))
def plan(
    as_json: JsonOption = False,
    history: Annotated[
        int | None,
        typer.Option(help="The last so many decisions in full, the newest first; at most 20 are kept.", min=1),
    ] = None,
    state_dir: StateDirOption = None,
) -> None:
    """The current plan: what it was made from, the alternatives, and why each of them lost."""
    answer = asyncio.run(fetch_status(_state_dir(state_dir).read_running()))
    if as_json:
        _print_json(plan_report(answer, history))
    elif history is not None:
        Console().print(history_tables(answer, history))
    else:
        Console().print(plan_tables(answer))


@app.command(
    epilog=_example("spotserve preempt i0", "spotserve preempt i0 --notice 5", "spotserve preempt i0 --cancel")
)
def preempt(
    instance: InstanceArgument,
    notice: Annotated[float, typer.Option(help="Seconds from the notice to the end.", min=0)] = 30.0,
    cancel: Annotated[bool, typer.Option("--cancel", help="Take an earlier notice back: the instance stays.")] = False,
    state_dir: StateDirOption = None,
) -> None:
    """Play the cloud: notice now, SIGKILL of the whole instance at the deadline."""
    if cancel:
        _command(state_dir, CancelNoticeCommand(instance=instance))
    else:
        _command(state_dir, PreemptCommand(instance=instance, notice_s=notice))


@app.command(epilog=_example("spotserve kill i0"))
def kill(instance: InstanceArgument, state_dir: StateDirOption = None) -> None:
    """SIGKILL a whole instance now, with no notice."""
    _command(state_dir, KillCommand(instance=instance))


@app.command(epilog=_example("spotserve add", "spotserve add --market on_demand"))
def add(
    market: Annotated[Market | None, typer.Option(help="Its market.", show_default="the market of `up`")] = None,
    state_dir: StateDirOption = None,
) -> None:
    """Launch one more instance."""
    _command(state_dir, AddCommand(market=market))


def _command(state_dir: Path | None, command: Command) -> None:
    _say(asyncio.run(send_command(_state_dir(state_dir).read_running(), command)))


@app.command(epilog=_example("spotserve chat", 'spotserve chat "Tell me a story" --max-tokens 200'))
def chat(
    message: Annotated[str | None, typer.Argument(help="One question; without it, a conversation.")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer, in tokens.", min=1)] = None,
    temperature: Annotated[float | None, typer.Option(help="0: greedy.", min=0)] = None,
    state_dir: StateDirOption = None,
) -> None:
    """Chat in the terminal; answers are streamed. Ctrl-C stops an answer, Ctrl-D ends.

    Where the gateway asks for an API key, it is read from the variable SPOTSERVE_API_KEY.
    """
    running = _state_dir(state_dir).read_running()
    with open_client(running.endpoint, os.environ.get(API_KEY_VARIABLE), running.tls_cert) as client:
        conversation = Conversation(
            client, running.served_model_name, system=system, max_tokens=max_tokens, temperature=temperature
        )
        if message is not None:
            _print_answer(conversation, message)
            return
        _say(f"{running.served_model_name} at {running.endpoint} (Ctrl-C stops an answer, Ctrl-D ends)")
        _converse(conversation)


def _converse(conversation: Conversation) -> None:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  input() has line editing and a history with it
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        try:
            if text:
                _print_answer(conversation, text)
        except KeyboardInterrupt:
            print(" [stopped]")
        except CommandError as error:
            print(f"error: {error}", file=sys.stderr)


def _print_answer(conversation: Conversation, text: str) -> None:
    for piece in conversation.ask(text):
        print(piece, end="", flush=True)
    print()


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
    epilog=_example(
        "spotserve simulate what-if --model llama-3.1-8b --device L4",
        "spotserve simulate run --help",
    ),
)
def simulate(context: typer.Context) -> None:
    """What would a model cost on spot capacity, and how would it behave? Nothing is rented or started."""
    # A program of its own, in this process's place: exit status, Ctrl-C and terminal are its own.
    os.execv(sys.executable, [sys.executable, "-m", "loadtest", "simulate", *context.args])  # noqa: S606  no shell is wanted


@model_app.command(epilog=_example("spotserve model fetch", "spotserve model fetch Qwen/Qwen2.5-0.5B-Instruct"))
def fetch(
    model: Annotated[str, typer.Argument(help="The default model, a hub id, or a directory to check.")] = DEFAULT_MODEL,
) -> None:
    """Fetch a model once, and check that the engine can load it."""
    _say(f"model in {resolve_model(model, cache_dir(os.environ), _say)}")


@app.command()
def version() -> None:
    """The installed version."""
    _say(f"spotserve {importlib.metadata.version('spotserve')}")


def _absolute(path: Path | None) -> Path | None:
    return path.expanduser().resolve() if path is not None else None


def _state_dir(given: Path | None) -> StateDir:
    return StateDir(given.expanduser().resolve() if given else default_state_dir(os.environ))


def _print_json(report: Any) -> None:
    print(msgspec.json.format(msgspec.json.encode(report), indent=2).decode())


def main() -> None:
    """Entry point: 0 when done, 2 with one line on standard error where something is wrong, 130 for Ctrl-C."""
    try:
        app()
    except DeployError as error:
        print(f"spotserve: {error}", file=sys.stderr)
        sys.exit(EXIT_ERROR)
    except KeyboardInterrupt:
        sys.exit(130)
