"""Runs a command line in this process: the real `main`, with its exit code and what it printed."""

from __future__ import annotations

import contextlib
import io
import sys
from dataclasses import dataclass

from mlxquant.cli.main import main


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


def mlxquant(*arguments: object, stdin: str | None = None) -> Result:
    """`mlxquant *arguments`; code 0 when main returns without exiting."""
    out, err = io.StringIO(), io.StringIO()
    argv, sys.argv = sys.argv, ["mlxquant", *map(str, arguments)]
    old_stdin = sys.stdin
    if stdin is not None:
        sys.stdin = io.StringIO(stdin)
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    finally:
        sys.argv, sys.stdin = argv, old_stdin
    return Result(code, out.getvalue(), err.getvalue())


def refused(result: Result, *words: str, code: int = 1) -> None:
    """One clear line (and at most one hint), the right exit code, and each of `words` in it."""
    lines = result.err.strip().splitlines()
    assert result.code == code, result
    assert lines[0].startswith("Error: "), result.err
    assert len(lines) <= 2, result.err
    assert "Traceback" not in result.err
    for word in words:
        assert word in result.err, (word, result.err)
