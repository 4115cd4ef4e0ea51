"""`mlxquant COMMAND`: finds the command's file, runs it, and draws errors as one line."""

from __future__ import annotations

import errno
import importlib
import io
import os
import sys
from pathlib import Path

import click

from mlxquant import __version__
from mlxquant.errors import MlxquantError, TargetError
from mlxquant.units import visible

# command -> what `mlxquant --help` says of it. The file is cli/<command>.py and holds a click command `command`.
COMMANDS = {
    "inspect": "Say what a model is: architecture, parameters, bits per weight, bytes by role.",
    "fit": "Say whether a model fits a Mac, how fast it will be, and which level to take.",
    "convert": "Quantize a folder, a Hub id or a GGUF file into an MLX folder or a GGUF file.",
    "imatrix": "Write which columns of each weight matter most on some text, as llama-imatrix does.",
    "verify": "Prove that a converted folder or file is what its plan says and still agrees with its source.",
    "generate": "Continue one prompt.",
    "chat": "Talk to a model, turn by turn.",
    "eval": "Say what quantizing cost: divergence of each student from its teacher, beside its size.",
    "bench": "Time prefill and decode, and compare with stock mlx-lm.",
    "doctor": "Say which device, BLAS, versions and memory limits are in force, and what to do about each.",
}

# How a write to stdout fails: its disk is full, its reader gone.
_STREAM_FAILS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EPIPE)


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
    _open_streams()
    try:
        group(standalone_mode=False, prog_name="mlxquant")
        sys.stdout.flush()
    except MlxquantError as error:
        draw(error)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("Stopped.", err=True)
        sys.exit(130)
    except OSError as error:
        # Files name themselves, and their failures are ours by now; what is left is the stream that results go to.
        if error.filename is not None or error.errno not in _STREAM_FAILS:
            raise
        sys.stdout = _nowhere()  # what it still holds cannot be written either
        if not isinstance(error, BrokenPipeError):  # whoever reads has seen enough
            draw(TargetError(f"the output cannot be written: {error.strerror}"))
        sys.exit(1)


def _nowhere() -> io.TextIOWrapper:
    return Path(os.devnull).open("r+", encoding="utf-8")  # stays open as the stream in its place does


def _open_streams() -> None:
    """A closed stdin (`<&-`) is an empty one, a closed stdout or stderr hears nothing. Bytes that are no UTF-8 are for
    whoever reads the text to refuse."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, _nowhere())
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")


def draw(error: MlxquantError) -> None:
    click.secho("Error: ", fg="red", err=True, nl=False)
    click.echo(visible(error.message), err=True)  # names in it come from files
    if error.hint:
        click.echo(f"  Next: {visible(error.hint)}", err=True)
