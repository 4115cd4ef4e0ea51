"""`mlxquant inspect PATH|ID`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

from mlxquant.units import format_bytes, format_count

_NUMBERS = ("tensors", "weights", "bytes", "share")
_MADE_CHARS = 200  # keys of a file may hold megabytes

if TYPE_CHECKING:
    from rich.table import Table

    from mlxquant.hub.listing import RemoteFile
    from mlxquant.plan.describe import Description, Sums


@click.command()
@click.argument("model", metavar="PATH|ID")
@click.option("--revision", help="Branch, tag or commit, when a Hub id is given.")
@click.option("--tensors", is_flag=True, help="List every tensor: role, shape, format, bytes.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(model: str, revision: str | None, tensors: bool, as_json: bool) -> None:
    """Say what a model is, from its config and tensor headers alone.

    PATH is a model folder (Hugging Face or MLX) or a .gguf file. ID is org/name or org/name/file.gguf on the
    Hub, whose weights are not downloaded.
    """
    from mlxquant.cli.resolve import is_hub_id

    if is_hub_id(model):
        description, origin = _remote(model, revision)
    else:
        description, origin = _local(model, revision)
    if as_json:
        click.echo(json.dumps(origin | description.to_json(tensors)))
    else:
        draw(description, origin, tensors)


def _local(model: str, revision: str | None) -> tuple[Description, dict[str, Any]]:
    from mlxquant.cli.resolve import resolve
    from mlxquant.convert.described import describe_path

    path = resolve(model, revision)
    return describe_path(path), {"path": str(path)}


def _remote(model: str, revision: str | None) -> tuple[Description, dict[str, Any]]:
    from mlxquant.plan.describe import describe, describe_gguf

    if model.endswith(".gguf"):
        from mlxquant.convert.described import front_bytes, gguf_header
        from mlxquant.hub.front import read_front

        parts, listing, file = read_front(model, revision, gguf_header, front_bytes)
        return describe_gguf(*parts), _origin(model, listing.revision, [file])
    from mlxquant.hub.headers import remote_specs

    remote = remote_specs(model, revision)
    return describe(remote.config, remote.specs), _origin(model, remote.revision, remote.files)


def _origin(model: str, revision: str, files: Iterable[RemoteFile]) -> dict[str, Any]:
    listed = [{"name": f.name, "bytes": f.nbytes, "sha256": f.sha256} for f in files]
    return {"id": model, "revision": revision, "files": listed}


def draw(description: Description, origin: dict[str, Any], tensors: bool) -> None:
    """For people: what it is, where its bytes are, and what to know about it."""
    from rich.console import Console

    # Nobody wraps what goes into a pipe.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    console.print(_table(["", ""], _facts(description, origin)))
    console.print(_sums("role", description.by_role(), description.nbytes))
    console.print(_sums("format", description.by_format(), description.nbytes))
    if tensors:
        rows = [
            (t.name, t.role or "unknown", " x ".join(map(str, t.shape)), t.format, f"{t.nbytes:,}")
            for t in description.tensors
        ]
        console.print(_table(["tensor", "role", "shape", "format", "bytes"], rows))
    for reason, count, _ in description.left_out:
        console.print(f"note: {count} tensors would be left out: {clean(reason)}", markup=False)
    for remark in description.remarks:
        console.print(f"note: {clean(remark)}", markup=False)


def _facts(d: Description, origin: dict[str, Any]) -> list[tuple[str, str]]:
    """Label and text of each line; lines that nothing is known for are left out."""
    f = d.facts
    expert_text = f"{f.experts}, {f.experts_per_token} for each token" if f.experts_per_token else f.experts
    lines: list[tuple[str, Any]] = [
        ("model", origin.get("path") or origin["id"]),
        ("revision", origin.get("revision")),
        ("architecture", " / ".join(filter(None, (d.architecture, d.model_type)))),
        ("parameters", f"{format_count(d.parameters)} ({d.parameters:,})"),
        ("size", f"{format_bytes(d.nbytes)}, {d.container}"),
        ("bits per weight", f"{d.bpw:.2f}" if d.bpw else None),
        (
            "quantization",
            ", ".join(f"{k} {v}" for k, v in d.quantization.items()) if d.quantization else None,
        ),
        *((key.replace("_", " "), value[:_MADE_CHARS]) for key, value in d.made.items()),
        ("layers", f.layers),
        ("hidden size", f.hidden_size),
        ("heads", f"{f.heads}, {f.kv_heads} for keys and values" if f.kv_heads else f.heads),
        ("head dim", f.head_dim),
        ("experts", expert_text),
        ("context", f"{f.context:,} tokens" if f.context else None),
        ("vocabulary", f"{f.vocab:,} tokens" if f.vocab else None),
        ("output head", None if f.tied is None else "the embedding (tied)" if f.tied else "its own"),
        ("other parts", ", ".join(m for m in d.modalities if m != "text") or None),
    ]
    return [(label, str(text)) for label, text in lines if text is not None]


def _sums(label: str, sums: Sums, total: int) -> Table:
    rows = [
        (key, f"{n:,}", format_count(weights), format_bytes(nbytes), f"{100 * nbytes / max(total, 1):.1f} %")
        for key, (n, weights, nbytes) in sums.items()
    ]
    return _table([label, *_NUMBERS], rows)


def _table(heads: list[str], rows: Iterable[tuple[str, ...]]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD if any(heads) else None, show_header=any(heads), pad_edge=False)
    for head in heads:
        right = head in _NUMBERS
        table.add_column(head, justify="right" if right else "left", no_wrap=right, overflow="fold")
    for row in rows:
        table.add_row(*(Text(clean(cell)) for cell in row))
    return table


def clean(text: str) -> str:
    """Names come from files: no control characters for the terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)
