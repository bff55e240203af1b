"""`spotserve keys`: create, list, revoke."""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from deploy.keys import create_key, read_keys, revoke_key
from deploy.settings import KEY_FILE_NAME, default_state_dir
from gateway.protocol import KeyRecord

DAY_S = 86400.0

keys_app = typer.Typer(
    no_args_is_help=True,
    help="API keys of the gateway. It reads the file again when it changes: no restart is needed.",
)
FileOption = Annotated[
    Path | None,
    typer.Option("--file", help="The file of the keys.", show_default="api-keys.json in the state directory of `up`"),
]


@keys_app.command(epilog="Example: `spotserve keys create team-a --requests-per-minute 60 --tokens-per-minute 20000`")
def create(
    name: Annotated[str, typer.Argument(help="Whose it is.")],
    model: Annotated[list[str] | None, typer.Option(help="It may use this model only; can be given again.")] = None,
    requests_per_minute: Annotated[int | None, typer.Option(min=1)] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(min=1, help="Prompts and answers.")] = None,
    budget_tokens: Annotated[int | None, typer.Option(min=1, help="In all, prompts and answers.")] = None,
    priority_class: Annotated[int, typer.Option(help="Keys of a lower class go first when requests wait.")] = 0,
    expires_in_days: Annotated[float | None, typer.Option(min=0)] = None,
    file: FileOption = None,
) -> None:
    """Make a key and print it, once: the file keeps only a hash of it."""
    path, now_s = _path(file), time.time()
    key = create_key(
        path,
        name,
        now_s,
        models=model or None,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        budget_tokens=budget_tokens,
        priority_class=priority_class,
        expires_s=None if expires_in_days is None else now_s + expires_in_days * DAY_S,
    )
    print(key)
    typer.echo(
        f"Keep it: it is not shown again. It stands, hashed, in {path}. An `up` that runs without keys must be started "
        "again to ask for them.",
        err=True,
    )


@keys_app.command("list")
def list_(file: FileOption = None) -> None:
    """The keys of the file, with their limits."""
    table = Table(Column("id", no_wrap=True), "name", Column("created", no_wrap=True), "expires", "limits")
    for key in read_keys(_path(file)).keys:
        table.add_row(key.id, key.name, _day(key.created_s), _day(key.expires_s), _limits(key))
    Console().print(table)


@keys_app.command()
def revoke(
    key: Annotated[str, typer.Argument(help="Its id, or its name if no other has it.")], file: FileOption = None
) -> None:
    """Take a key away; running gateways refuse it within a second."""
    record = revoke_key(_path(file), key)
    print(f"{record.id} ({record.name}) is revoked")


def _path(given: Path | None) -> Path:
    return given.expanduser().resolve() if given else default_state_dir(os.environ) / KEY_FILE_NAME


def _limits(key: KeyRecord) -> str:
    limits = {
        "requests a minute": key.requests_per_minute,
        "tokens a minute": key.tokens_per_minute,
        "tokens in all": key.budget_tokens,
    }
    parts = [f"{limit:,} {what}" for what, limit in limits.items() if limit is not None]
    parts += [f"only {', '.join(key.models)}"] if key.models is not None else []
    parts += [f"class {key.priority_class}"] if key.priority_class else []
    return "; ".join(parts) or "none"


def _day(time_s: float | None) -> str:
    return "never" if time_s is None else datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%d")
