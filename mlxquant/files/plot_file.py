"""Plots as files: what every plot of ours is drawn with, and how it gets onto the disk.

matplotlib draws; it is an optional dependency and imported only here and where a figure is made.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mlxquant.errors import TargetError, UsageError

_STYLE = {
    "figure.dpi": 100,
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "svg.fonttype": "none",  # text stays text: it can be searched, and it is read aloud
    "svg.hashsalt": "mlxquant",
    "text.parse_math": False,  # a $ in a name is a $
}


def check_file(path: Path, suffixes: Sequence[str]) -> None:
    """What can be refused before anything is computed. Raises UsageError for another suffix or without matplotlib,
    TargetError for a folder that is not there.
    """
    if path.suffix.lower() not in suffixes:
        found, last = path.suffix or "no suffix", suffixes[-1]
        raise UsageError(
            f"{path}: a plot is a {', '.join(suffixes[:-1])} or {last} file, found {found}",
            hint=f"name it {', '.join(f'out{one}' for one in suffixes[:-1])} or out{last}",
        )
    if find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib, which is not installed", hint="pip install 'mlxquant[plot]'")
    if not os.path.isdir(path.parent):  # noqa: PTH112 - Path's own raises for a name too long
        raise TargetError(f"{path}: there is no folder {path.parent}", hint="make it, or choose another")


@contextmanager
def style(more: Mapping[str, Any] = MappingProxyType({})) -> Iterator[None]:
    """matplotlib's defaults and ours, whatever the user's matplotlibrc says; the user's again afterwards."""
    import matplotlib
    import matplotlib.style

    with matplotlib.style.context("default"), matplotlib.rc_context({**_STYLE, **more}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # names in scripts that DejaVu lacks
        yield


def file_bytes(drawn: Any, kind: str) -> bytes:
    """A Figure as 'png' or 'svg': the same bytes for the same figure under one version of matplotlib."""
    out = io.BytesIO()
    nothing: dict[str, None] = {} if kind == "png" else dict.fromkeys(("Date", "Creator", "Format", "Type"))
    drawn.savefig(out, format=kind, dpi=200, metadata=nothing)
    return out.getvalue()
