"""`mlxquant COMMAND`: finds the command's file, runs it, and draws errors as one line."""

from __future__ import annotations

import importlib
import io
import os
import sys
from pathlib import Path

import click

from mlxquant import __version__
from mlxquant.errors import MlxquantError

# command -> what `mlxquant --help` says of it. The file is cli/<command>.py and holds a click command `command`.
COMMANDS = {
    "inspect": "Say what a model is: architecture, parameters, bits per weight, bytes by role.",
    "fit": "Say whether a model fits a Mac, how fast it will be, and which level to take.",
    "convert": "Quantize a folder, a Hub id or a GGUF file into an MLX folder or a GGUF file.",
    "verify": "Prove that a converted folder or file is what its plan says and still agrees with its source.",
    "generate": "Continue one prompt.",
    "chat": "Talk to a model, turn by turn.",
    "eval": "Say what quantizing cost: divergence of each student from its teacher, beside its size.",
    "bench": "Time prefill and decode, and compare with stock mlx-lm.",
    "doctor": "Say which device, BLAS, versions and memory limits are in force, and what to do about each.",
}


class LazyGroup(click.Group):
    """Imports a command's file only when that command is called or asked for its own help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command = importlib.import_module(f"mlxquant.cli.{name}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="mlxquant")
def group() -> None:
    """Pull, plan, quantize, verify, time and chat with language models on your own Mac."""


def main() -> None:
    """Runs the command line. Our own errors are one line and a hint; Ctrl-C is 130; a traceback is a bug of ours."""
    _open_stdin()
    try:
        group(standalone_mode=False, prog_name="mlxquant")
    except MlxquantError as error:
        draw(error)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("Stopped.", err=True)
        sys.exit(130)


def _open_stdin() -> None:
    """A closed stdin (`<&-`) is an empty one. Bytes that are no UTF-8 are for whoever reads the text to refuse."""
    if sys.stdin is None:
        sys.stdin = Path(os.devnull).open(encoding="utf-8")  # noqa: SIM115 - stays open as stdin does
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")


def draw(error: MlxquantError) -> None:
    click.secho("Error: ", fg="red", err=True, nl=False)
    click.echo(error.message, err=True)
    if error.hint:
        click.echo(f"  Next: {error.hint}", err=True)
