"""What a terminal shows after an answer was drawn: all of it, once, whatever its length."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from mlxquant.cli.markdown import settled, show

WIDTH, HEIGHT = 40, 8
ANSWER = """Here is a class:

```python
class Account:
    def deposit(self, amount):
        self.balance += amount

""" + "".join(f"    line_{i} = {i}\n" for i in range(20)) + """```

1. First

2. Second, which is longer than the terminal is wide, so that it wraps
   - within

| a | b |
|---|---|
| 1 | 2 |

The end, 中文字 and a 🌱.
"""  # fmt: skip


class Screen:
    """The few control codes that rich's Live uses: lines that have left at the top cannot be reached again."""

    def __init__(self) -> None:
        self.lines, self.row = [""], 0

    def feed(self, text: str) -> None:
        for code, char in re.findall(r"(\x1b\[[0-9;?]*[A-Za-z])|(.|\n|\r)", text):
            if char == "\n":
                self.row += 1
                self.lines += [""] * (self.row + 1 - len(self.lines))
            elif char and char != "\r":
                self.lines[self.row] += char
            elif code.endswith("A"):
                self.row = max(self.row - int(code[2:-1] or 1), len(self.lines) - HEIGHT, 0)
            elif code == "\x1b[2K":
                self.lines[self.row] = ""


def drawn(pieces) -> list[str]:
    """The scrollback, without empty lines."""
    file = io.StringIO()
    show(iter(pieces), Console(file=file, force_terminal=True, color_system=None, width=WIDTH, height=HEIGHT))
    screen = Screen()
    screen.feed(file.getvalue())
    return [line.strip() for line in screen.lines if line.strip()]


def test_the_screen_can_double_lines():
    """The check below can fail: a region higher than the terminal, drawn twice, is there twice."""
    screen = Screen()
    screen.feed("".join(f"{i}\n" for i in range(20)) + "\x1b[1A\x1b[2K" * 20 + "".join(f"{i}\n" for i in range(20)))
    assert screen.lines.count("3") == 2


@pytest.mark.parametrize("size", [1, 7, 64, 10_000])
def test_a_long_answer_is_there_once_and_whole(size):
    lines = drawn(ANSWER[i : i + size] for i in range(0, len(ANSWER), size))
    for i in range(20):
        assert lines.count(f"line_{i} = {i}") == 1
    text = " ".join(lines)
    for part in ("Here is a class:", "class Account:", "1 First", "2 Second", "within", "The end, 中文字 and a 🌱."):
        assert text.count(part) == 1, part
    assert lines == drawn([ANSWER])


def test_nothing_is_left_out():
    text = "<think>\nHm\n</think>\n\nA `List` is List<String>, see [it](http://x.y/z).\nroses\nviolets\n\n[1]: http://q.r\n"
    lines = drawn([text])
    for part in ("<think>", "Hm", "</think>", "List<String>", "http://x.y/z", "[1]: http://q.r"):
        assert any(part in line for line in lines), part
    assert lines[-3:-1] == ["roses", "violets"]


def test_only_the_last_block_is_drawn_again():
    assert settled("One\n\nTwo") == 0, "Two may become anything: it has no line end yet"
    assert settled("One\n\nTwo\n") == 5
    assert settled("```\na\n\nb\n") == 0
    assert settled("1. a\n\n2") == 0, "perhaps the list goes on"
    assert settled("1. a\n\n2. b\n") == 0
    assert settled("") == 0


def test_what_was_said_before_an_interruption_stays():
    def pieces():
        yield "One\n\nTwo"
        raise KeyboardInterrupt

    file = io.StringIO()
    with pytest.raises(KeyboardInterrupt):
        show(pieces(), Console(file=file, force_terminal=True, color_system=None, width=WIDTH, height=HEIGHT))
    screen = Screen()
    screen.feed(file.getvalue())
    assert [line.strip() for line in screen.lines if line.strip()] == ["One", "Two"]
