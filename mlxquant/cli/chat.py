"""`mlxquant chat MODEL`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import closing
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
    from mlxquant.run.ready import Ready
    from mlxquant.run.session import Session

HELP = """\
/reset          forget the conversation
/system TEXT    set the system prompt (nothing: remove it)
/save FILE      save the conversation
/load FILE      go on with a saved one
/stats          tokens, speed and memory so far
/help           this list
/exit           leave (or Ctrl-D)
Ctrl-C stops an answer and keeps the chat, or takes back what is typed. A line that ends in \\ goes on in the next."""


@click.command()
@click.argument("model")
@click.option("--system", help="System prompt.")
@click.option("-n", "--max-tokens", type=int, help="Longest answer. Default: what the context has room for.")
@sampling_options
@running_options
@click.option("--stats", "always_stats", is_flag=True, help="Print a line of stats after each answer.")
def command(model: str, system: str | None, max_tokens: int | None, always_stats: bool, **options: Any) -> None:
    """Talk to MODEL: a folder, a .gguf file or a Hub id. /help lists the commands.

    Tokens are drawn as the model's generation_config.json says, where it has settings for that; else the most likely is
    taken. --temp, --top-p and the like each override one of them, and --temp 0 always takes the most likely token.

    Without a terminal, each line of stdin is a question, and the answers go to stdout as plain text.
    """
    if max_tokens is not None and max_tokens < 1:
        raise UsageError(f"{max_tokens} tokens cannot be generated", hint="use --max-tokens 1 or more")
    path, device, text = open_text(model, options)
    sampling = sampling_from(options, text.sampling)
    from mlxquant.run.sampling import describe
    from mlxquant.run.session import Session, require_template

    require_template(text)
    ready = open_ready(path, device, text, options, options["context"])
    session = Session(
        ready.loaded.model, ready.text, ready.plan, sampling=sampling, system=system, max_tokens=max_tokens,
        context_tokens=_context(ready, options["context"]), prefill_step=ready.prefill_step, stops=options["stops"],
    )  # fmt: skip
    say_ready(ready, options)
    if text.sampling:
        click.secho(f"sampling: {describe(sampling)}", dim=True, err=True)
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
        except KeyboardInterrupt:  # pressed again before the first press could be heeded
            if not sys.stdin.isatty():
                raise
            click.secho("(stopped)", dim=True, err=True)
        except MlxquantError as error:
            from mlxquant.cli.main import draw

            draw(error)
            failed = True
    return failed


def questions() -> Iterator[str]:
    """Lines that are not empty, from the terminal (with editing and history) or a pipe. Ctrl-C at the prompt takes back
    what was typed: one that came just after the answer's end must not end the chat.
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
        except KeyboardInterrupt:
            if not on_terminal:
                raise
            click.secho("\n(Ctrl-D or /exit leaves)", dim=True, err=True)
            held = ""
            continue
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
    from mlxquant.cli.progress import PromptBar
    from mlxquant.run.interrupt import interruptible

    with (
        interruptible() as stop,
        PromptBar() as bar,
        closing(session.ask(question, on_progress=bar, stop=stop)) as said,
    ):
        show(said)
    if remark := _remark(session):
        click.secho(remark, dim=True, err=True)


def _context(ready: Ready, asked: int | None) -> int:
    """A cache that keeps its size has room for all that the model was made for."""
    longest = ready.loaded.context_tokens if ready.plan.bounded and not asked else None
    return max(ready.context_tokens, longest or 0)


def _remark(session: Session) -> str:
    """What the user should know of the last answer, '' when it ended by itself."""
    from mlxquant.run.session import FULL_CONTEXT_HINT

    turn = session.turns[-1]
    ends = {
        "stopped": "(stopped)",
        "length": f"(cut after --max-tokens {session.max_tokens})",
        "full context": f"(cut: the context of {session.context_tokens} tokens is full; {FULL_CONTEXT_HINT})",
    }
    end = "(stopped before it began: the question is forgotten)" if turn.dropped else ends.get(turn.finish or "", "")
    return "\n".join(line for line in (turn.recomputed, end) if line)


def show(pieces: Iterator[str]) -> None:
    """Markdown that grows on a terminal, plain text elsewhere."""
    if sys.stdout.isatty():
        from mlxquant.cli.markdown import show as draw_markdown

        draw_markdown(pieces)
        return
    for piece in pieces:
        click.echo(piece, nl=False)
    click.echo()


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
    other = session.load(path)
    said = f"Loaded {len(session.messages)} messages from {path}."
    return said if other in (None, session.model_name) else f"{said} They were held with {other}."


def _stats(session: Session, rest: str) -> str:
    count = len(session.turns)
    return (
        last_turn(session)
        + f"\n{count} answer{'s' if count != 1 else ''} | cache {session.cached_tokens} tokens, "
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
    try:
        return Path(rest).expanduser()
    except RuntimeError as error:
        raise UsageError(f"{rest}: there is no such user", hint=f"{command} chat.json") from error


def _peak_bytes() -> int:
    import mlx.core as mx

    return int(mx.get_peak_memory())
