"""Every command has help that says what it does and what each option means, and the docs repeat it word for word."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pytest

from mlxquant.cli.main import COMMANDS, group

ROOT = Path(__file__).parent.parent.parent


def command(name: str) -> click.Command:
    found = group.get_command(click.Context(group), name)
    assert found is not None
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_what_it_does(name):
    help_text = command(name).help or ""
    assert len(help_text.split()) >= 8


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_help(name):
    missing = [p.name for p in command(name).params if isinstance(p, click.Option) and not p.help]
    assert missing == []


def test_docs_hold_the_help_as_it_is():
    done = subprocess.run(
        [sys.executable, "scripts/write_commands.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_readme_names_every_command(name):
    assert f"mlxquant {name}" in (ROOT / "README.md").read_text()


def test_files_of_commands_are_all_listed():
    """A file that defines a `command` is one of COMMANDS, and the other way round."""
    files = {p.stem for p in (ROOT / "mlxquant" / "cli").glob("*.py") if "\ndef command(" in p.read_text()}
    assert files == {name.replace("-", "_") for name in COMMANDS}


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)])
def test_help_loads_nothing_heavy(arguments):
    code = (
        f"import sys; sys.argv = ['mlxquant', *{arguments!r}]\n"
        "from mlxquant.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = ('mlx', 'mlx_lm', 'transformers', 'tokenizers', 'numba')\n"
        "print([m for m in heavy if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout
    assert done.stderr.strip() == "[]"


def test_an_unknown_command_is_a_usage_error():
    done = subprocess.run([sys.executable, "-m", "mlxquant", "quantise"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "quantise" in done.stderr


def test_a_bug_shows_its_traceback():
    code = (
        "import sys; sys.argv = ['mlxquant', 'doctor']\n"
        "import mlxquant.cli.main as m\n"
        "m.group.invoke = lambda ctx: 1 / 0\n"
        "m.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ZeroDivisionError" in done.stderr
