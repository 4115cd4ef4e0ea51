"""`mlxquant eval TEACHER STUDENT...`."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from mlxquant.cli.progress import waiting, watching
from mlxquant.cli.resolve import resolve
from mlxquant.cli.running import Tokens
from mlxquant.errors import TargetError, UsageError

if TYPE_CHECKING:
    from mlxquant.measure.match import Side
    from mlxquant.measure.report import Report
    from mlxquant.measure.runner import How
    from mlxquant.measure.windows import Windows

WINDOWS = 64
LAYERS_WINDOWS = 2  # --layers runs the model once for each tensor and window


def count(text: str | None, default: int) -> int | None:
    """'all' -> None. Raises UsageError."""
    if text is None:
        return default
    if text == "all":
        return None
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise UsageError(f"--windows {text} is neither a number from 1 nor 'all'", hint="try --windows 64")
    return int(text)


@click.command()
@click.argument("teacher")
@click.argument("students", nargs=-1, required=True, metavar="STUDENT...")
@click.option(
    "--text",
    default="builtin",
    show_default=True,
    metavar="FILE|DATASET|builtin",
    help="What is read: a text file, a Hub dataset (org/name), or what every Python ships.",
)
@click.option(
    "--context", type=Tokens(), default=512, show_default=True, help="Tokens of a window; its second half is scored."
)
@click.option("--windows", metavar="N|all", help="How many windows of the text.  [default: 64; 2 with --layers]")
@click.option("--stride", type=Tokens(), help="Tokens from one window's beginning to the next.  [default: --context]")
@click.option(
    "--keep",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Keep the teacher's states and all scores there, for other students later.",
)
@click.option(
    "--layers", is_flag=True, help="Where does it come from: the teacher with one tensor of the STUDENT at a time."
)
@click.option("--speed", is_flag=True, help="Also time prefill and decode of each model, as `bench` does.")
@click.option(
    "--worst", type=click.IntRange(0), default=5, show_default=True, help="Positions of most divergence to show."
)
@click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Draw divergence against bits per weight: .png, .svg or .html.",
)
@click.option("--card", is_flag=True, help="Print a Markdown block for a model card instead of the table.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "gpu"]), default="auto", show_default=True, help="Where to compute."
)
@click.option(
    "--expand",
    type=click.Choice(["auto", "on", "off"]),
    default="auto",
    show_default=True,
    help="Expand weights to float32, on a CPU only, where they fit.",
)
@click.option("--force", is_flag=True, help="Run even if the memory budget says that a model does not fit.")
def command(teacher: str, students: tuple[str, ...], **options: Any) -> None:
    """Say what quantizing cost: how far each STUDENT drifted from the full-precision TEACHER, beside its size.

    Models are folders, .gguf files or Hub ids, in any mix. Both read the same windows of text, as llama-perplexity does
    (512 tokens, the second half scored), and their next-token probabilities are compared over the whole vocabulary:
    KL divergence, perplexity, how often the best token differs. Errors are standard errors, clustered by window.

    Ctrl-C ends after the window at hand and shows what was scored; the same command goes on from there.
    """
    _check(students, options)
    sides, how, windows = _open(teacher, students, options)
    if options["layers"]:
        _layers(sides, windows, how, options)
        return
    from mlxquant.measure.evaluate import evaluate, own_folder

    folder = options["keep"] or own_folder(sides[0], windows, how)
    try:
        with watching() as watch:
            report = evaluate(sides[0], sides[1:], windows, how, folder, watch)
    except TargetError as error:
        if options["keep"]:
            raise
        raise TargetError(error.message, hint="name a folder that can be written to with --keep DIR") from error
    try:
        if options["speed"] and not report.interrupted:
            report = _timed(report, sides, how)
    finally:  # what was scored is shown whatever becomes of the timing: Ctrl-C ends that, too
        _show(report, options)
    if report.interrupted:
        _stop("the same command goes on from here.")
    if not options["keep"]:
        shutil.rmtree(folder, ignore_errors=True)  # not before everything is shown


def _stop(rest: str) -> NoReturn:
    click.echo(f"Stopped: {rest}", err=True)
    sys.exit(130)


def _check(students: tuple[str, ...], options: dict[str, Any]) -> None:
    """What can be refused before anything is opened."""
    if options["card"] and options["as_json"]:
        raise UsageError("--card and --json are two forms of the same", hint="choose one")
    if options["layers"]:
        if len(students) > 1:
            raise UsageError(f"--layers takes one STUDENT, found {len(students)}", hint="name one")
        for name in ("card", "plot", "speed", "keep"):
            if options[name]:
                raise UsageError(f"--layers has no --{name}", hint="leave one of them out")
    if options["plot"]:
        from mlxquant.measure.plot import check_plot

        check_plot(options["plot"])


def _open(teacher: str, students: tuple[str, ...], options: dict[str, Any]) -> tuple[list[Side], How, Windows]:
    """Everything but the weights: text, paths, device, tokenizers. To pull a model takes minutes, so all that may be
    refused without one comes first.
    """
    from mlxquant.measure.corpus import load_corpus
    from mlxquant.measure.windows import Protocol, cut
    from mlxquant.run.device import prepare

    wanted = count(options["windows"], LAYERS_WINDOWS if options["layers"] else WINDOWS)
    protocol = Protocol(options["context"], options["stride"], wanted)
    with waiting("Reading the text"):
        corpus = load_corpus(options["text"])
    paths = [resolve(model) for model in (teacher, *students)]
    with waiting("Opening the models"):
        device = prepare(options["device"])
        from mlxquant.convert.sources import open_source
        from mlxquant.measure.evaluate import named
        from mlxquant.measure.match import Side
        from mlxquant.measure.runner import How
        from mlxquant.run.text import Text

        sides = [
            Side(path, open_source(path).config, Text.load(path), name)
            for path, name in zip(paths, named(paths), strict=True)
        ]
        windows = cut(sides[0].text, corpus, protocol)
    return sides, How(device, options["expand"], options["force"], options["worst"]), windows


def _timed(report: Report, sides: list[Side], how: How) -> Report:
    from mlxquant.measure.timed import with_speed

    with waiting("Timing each model"):
        return with_speed(report, sides, how)


def _show(report: Report, options: dict[str, Any]) -> None:
    """The figures first: hours of scoring do not hang on a plot that cannot be written."""
    from rich.console import Console

    if options["as_json"]:
        click.echo(json.dumps(report.to_json()))
    elif options["card"]:
        from mlxquant.measure.card import card

        click.echo(card(report))
    else:
        from mlxquant.cli.eval_table import show

        show(report, Console())
        if not report.interrupted:
            click.echo("Next: --layers says which tensors of one STUDENT it comes from.")
    if options["plot"]:
        from mlxquant.measure.plot import plot

        plot(report, options["plot"])
        click.echo(f"Drawn: {options['plot']}", err=True)


def _layers(sides: list[Side], windows: Windows, how: How, options: dict[str, Any]) -> None:
    from dataclasses import asdict

    from rich.console import Console

    from mlxquant.cli.eval_table import show_layers
    from mlxquant.measure.by_tensor import by_tensor

    with watching() as watch:
        whole, rows, total = by_tensor(sides[0], sides[1], windows, how, watch=watch)
    interrupted = len(rows) < total
    if options["as_json"]:
        tensors = [asdict(row) for row in rows]
        click.echo(json.dumps({"whole": asdict(whole), "tensors": tensors, "interrupted": interrupted}))
    else:
        show_layers(rows, whole, Console())
    if interrupted:
        _stop(f"these are {len(rows):,} of {total:,} tensors, and the same command begins with the first again.")
