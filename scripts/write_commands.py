"""Writes docs/commands.md: every command with the help it prints. A test keeps the file true.

python scripts/write_commands.py [--check]
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from mlxquant.cli.main import COMMANDS, group

PATH = Path(__file__).resolve().parent.parent / "docs" / "commands.md"
HEAD = """# Commands

Written by `python scripts/write_commands.py` from the commands' own `--help`; a test fails when it is out of date.
"""


def text() -> str:
    context = click.Context(group, info_name="mlxquant", terminal_width=100, max_content_width=100)
    sections = [HEAD, block(group.get_help(context))]
    for name in COMMANDS:
        command = group.get_command(context, name)
        assert command is not None
        inner = click.Context(command, info_name=name, parent=context, terminal_width=100, max_content_width=100)
        sections += [f"## {name}\n", block(command.get_help(inner))]
    return "\n".join(sections)


def block(help_text: str) -> str:
    return "```text\n" + "\n".join(line.rstrip() for line in help_text.splitlines()) + "\n```\n"


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(0 if PATH.read_text() == text() else f"{PATH} is out of date: run python scripts/write_commands.py")
    PATH.write_text(text())
