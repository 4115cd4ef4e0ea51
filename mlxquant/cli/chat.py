"""`mlxquant chat MODEL`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxquant.cli.running import (
    open_ready,
    open_text,
    running_options,
    sampling_from,
    sampling_options,
    say_ready,
    stats_line,
)
from mlxquant.errors import MlxquantError, UsageError
from mlxquant.units import format_bytes

if TYPE_CHECKING:
    from mlxquant.run.session import Session

HELP = """\
/reset          forget the conversation
/system TEXT    set the system prompt (nothing: remove it)
/save FILE      save the conversation
/load FILE      go on with a saved one
/stats          tokens, speed and memory so far
/help           this list
/exit           leave (or Ctrl-D)
Ctrl-C stops an answer and keeps the chat. A line that ends in \\ goes on in the next."""


@click.command()
@click.argument("model")
@click.option("--system", help="System prompt.")
@click.option("-n", "--max-tokens", type=int, help="Longest answer. Default: what the context has room for.")
@sampling_options
@running_options
@click.option("--stats", "always_stats", is_flag=True, help="Print a line of stats after each answer.")
def command(model: str, system: str | None, max_tokens: int | None, always_stats: bool, **options: Any) -> None:
    """Talk to MODEL: a folder, a .gguf file or a Hub id. /help lists the commands.

    Without a terminal, each line of stdin is a question, and the answers go to stdout as plain text.
    """
    if max_tokens is not None and max_tokens < 1:
        raise UsageError(f"{max_tokens} tokens cannot be generated", hint="use --max-tokens 1 or more")
    sampling = sampling_from(options)
    path, device, text = open_text(model, options)
    from mlxquant.run.session import Session, require_template

    require_template(text)
    ready = open_ready(path, device, text, options, options["context"])
    session = Session(
        ready.loaded.model, ready.text, ready.plan, sampling=sampling, system=system, max_tokens=max_tokens,
        context_tokens=ready.context_tokens, prefill_step=ready.prefill_step, stops=options["stops"],
    )  # fmt: skip
    say_ready(ready, options)
    if sys.stdin.isatty():
        click.secho(f"{ready.text.name}, {ready.loaded.quantization}. /help lists the commands.", dim=True, err=True)
    failed = talk(session, always_stats)
    # A script that pipes its questions must learn that one of them failed.
    if failed and not sys.stdin.isatty():
        sys.exit(1)


def talk(session: Session, always_stats: bool) -> bool:
    """Reads and answers until /exit or the end of input; returns whether anything failed."""
    failed = False
    for line in questions():
        try:
            if line.startswith("/"):
                if not obey(session, line):
                    return failed
            else:
                answer(session, line.strip())
                if always_stats:
                    click.secho(last_turn(session), dim=True, err=True)
        except MlxquantError as error:
            from mlxquant.cli.main import draw

            draw(error)
            failed = True
    return failed


def questions() -> Iterator[str]:
    """Lines that are not empty, from the terminal (with editing and history) or a pipe. Ctrl-C at the prompt
    leaves.
    """
    on_terminal = sys.stdin.isatty()
    if on_terminal:
        import readline  # noqa: F401  (input() edits and remembers lines once it is imported)
    held = ""
    while True:
        try:
            line = input("> " if not held else ". ") if on_terminal else _next_line()
        except EOFError:
            return
        held += line
        if held.endswith("\\"):
            held = held[:-1] + "\n"
        elif held.strip():
            yield held.rstrip()  # a question that begins with a space may begin with a slash
            held = ""


def _next_line() -> str:
    if line := sys.stdin.readline():
        return line.rstrip("\n")
    raise EOFError


def answer(session: Session, question: str) -> None:
    from mlxquant.run.interrupt import interruptible

    with interruptible() as stop:
        show(session.ask(question, stop=stop))
    turn = session.turns[-1]
    if turn.recomputed:
        click.secho(turn.recomputed, dim=True, err=True)
    if turn.finish == "stopped":
        click.secho("(stopped)", dim=True, err=True)


def show(pieces: Iterator[str]) -> None:
    """Markdown that grows on a terminal, plain text elsewhere."""
    if not sys.stdout.isatty():
        for piece in pieces:
            click.echo(piece, nl=False)
        click.echo()
        return
    from rich.console import Console
    from rich.live import Live
    from rich.markdown import Markdown

    text = ""
    # While it grows only the part that fits the screen is shown; the whole answer stays when it is done.
    with Live(console=Console(), refresh_per_second=8, vertical_overflow="crop") as live:
        for piece in pieces:
            text += piece
            live.update(Markdown(_tail(text, live.console.height)))
        live.vertical_overflow = "visible"
        live.update(Markdown(text), refresh=True)


def _tail(text: str, height: int) -> str:
    """The last lines: a screenful of source is at least a screenful of rendered text, near enough."""
    return "\n".join(text.split("\n")[-max(height - 2, 1) :])


def obey(session: Session, line: str) -> bool:
    """Carries out a /command; False when it is /exit. Raises UsageError for one that does not exist."""
    name, _, rest = line[1:].partition(" ")
    if name in ("exit", "quit"):
        return False
    if name not in COMMANDS:
        raise UsageError(f"/{name} is no command", hint="/help lists them; begin a question with a space to ask it")
    if said := COMMANDS[name](session, rest.strip()):
        click.echo(said, err=True)
    return True


def _reset(session: Session, rest: str) -> str:
    session.reset()
    return "The conversation is forgotten."


def _system(session: Session, rest: str) -> str:
    session.set_system(rest)
    return "System prompt set." if rest else "System prompt removed."


def _save(session: Session, rest: str) -> str:
    path = _file(rest, "/save")
    session.save(path)
    return f"Saved {len(session.messages)} messages to {path}."


def _load(session: Session, rest: str) -> str:
    path = _file(rest, "/load")
    session.load(path)
    return f"Loaded {len(session.messages)} messages from {path}."


def _stats(session: Session, rest: str) -> str:
    return (
        last_turn(session)
        + f"\n{len(session.turns)} answers | cache {session.cached_tokens} tokens, "
        + (f"{format_bytes(session.cache_bytes)} | peak memory {format_bytes(_peak_bytes())}")
    )


def _help(session: Session, rest: str) -> str:
    return HELP


COMMANDS: dict[str, Callable[[Session, str], str]] = {
    "reset": _reset, "system": _system, "save": _save, "load": _load, "stats": _stats, "help": _help,
}  # fmt: skip


def last_turn(session: Session) -> str:
    if not session.turns:
        return "No answer yet."
    turn = session.turns[-1]
    return stats_line(turn.stats, turn.finish, turn.reused_tokens)


def _file(rest: str, command: str) -> Path:
    if not rest:
        raise UsageError(f"{command} needs a file name", hint=f"{command} chat.json")
    return Path(rest).expanduser()


def _peak_bytes() -> int:
    import mlx.core as mx

    return int(mx.get_peak_memory())
