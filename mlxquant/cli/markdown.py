"""An answer as markdown that grows on a terminal.

A block (a paragraph, a list, a piece of code) is printed once, when the next one has begun; only the last block is
drawn again as it grows. So an answer of any length is in the scrollback once and whole.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment

# No HTML and no link definitions: a renderer for the terminal leaves both out, and with them `<think>`, `List<String>`
# and the sources that an answer ends with.
_PARSER = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"]).disable(["reference"])


class Prose(Markdown):
    """Rich's markdown with nothing left out: tags are text, line breaks stay, a link shows its address."""

    def __init__(self, text: str) -> None:
        super().__init__("", hyperlinks=False)
        self.markup, self.parsed = text, _PARSER.parse(text)
        for token in self.parsed:
            for child in token.children or ():
                if child.type == "softbreak":
                    child.type = "hardbreak"


class Tail:
    """The last lines of `text` as rendered, as many as the terminal shows."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in console.render_lines(Prose(self._text), options, pad=False)[1 - console.height :]:
            yield from line
            yield Segment.line()


def settled(text: str) -> int:
    """Characters of `text` that no later text can change: all before its last block.

    Only whole lines are looked at: of a list's next item there may be nothing but its number so far.
    """
    lines = text[: text.rfind("\n") + 1].splitlines(keepends=True)
    starts = [token.map[0] for token in _PARSER.parse("".join(lines)) if token.level == 0 and token.map]
    return len("".join(lines[: starts[-1]])) if starts else 0


def show(pieces: Iterator[str], console: Console | None = None) -> None:
    """Draws the pieces as they come."""
    console = console or Console()
    text, printed = "", False

    def finish(block: str) -> None:
        nonlocal printed
        if printed:
            console.print()
        console.print(Prose(block))
        printed = True

    try:
        with _no_echo(), Live(console=console, refresh_per_second=8, transient=True) as live:
            for piece in pieces:
                text += piece
                end = settled(text) if "\n" in piece else 0
                block, text = text[:end], text[end:]
                live.update(Tail(text))
                if block:
                    finish(block)
    finally:
        if text.strip():
            finish(text)


@contextmanager
def _no_echo() -> Iterator[None]:
    """What is typed during an answer, such as the ^C that stops it, would be echoed into the drawing and shift it."""
    if not sys.stdin.isatty():
        yield
        return
    import termios

    before = termios.tcgetattr(sys.stdin)
    quiet = [*before]
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
