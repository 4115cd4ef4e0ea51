"""`mlxquant imatrix SRC -o imatrix.gguf`."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxquant.cli.calibration_options import calibration_options, check_calibration, samples_of
from mlxquant.cli.progress import waiting, watching
from mlxquant.cli.resolve import resolve
from mlxquant.cli.sections import SectionCommand
from mlxquant.errors import TargetError, UsageError
from mlxquant.units import format_bytes, format_duration

if TYPE_CHECKING:
    from mlxquant.calibrate.values import Samples
    from mlxquant.files.imatrix import Sums


@click.command(cls=SectionCommand)
@click.argument("source", metavar="SRC")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="The .gguf file to write.")
@click.option("--revision", help="Branch, tag or commit, when SRC is a Hub id.")
@calibration_options("The text")
@click.option(
    "--process-output", is_flag=True, help="Also of output.weight. As in llama-imatrix, left out unless asked for."
)
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "gpu"]), default="auto", show_default=True, help="Where to compute."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
def command(source: str, out: Path, revision: str | None, as_json: bool, **options: Any) -> None:
    """Write the importance matrix of SRC: how much each column of each weight matters on some text.

    SRC is a Hugging Face folder, an MLX folder, a Hub id or a .gguf file. The file is llama-imatrix's: `llama-quantize
    --imatrix` reads it, and so does `mlxquant convert --type Q4_K_M --imatrix`. One layer at a time is in memory.
    """
    _check(out, options)
    path = resolve(source, revision)
    began = time.perf_counter()
    try:
        samples, sums, notes = _collect(path, options)
    except KeyboardInterrupt:
        click.echo("Stopped: nothing was written.", err=True)
        sys.exit(130)
    from mlxquant.files.imatrix import write_imatrix

    write_imatrix(out, sums, [samples.label], *samples.tokens_BL.shape)
    _say(out, samples, sums, notes, time.perf_counter() - began, as_json)


def _check(out: Path, options: Mapping[str, Any]) -> None:
    """What can be refused before anything is opened."""
    if out.suffix.lower() != ".gguf":
        raise UsageError(f"{out}: an importance matrix is a GGUF file", hint=f"write -o {out}.gguf")
    if not out.absolute().parent.is_dir() or not os.access(out.absolute().parent, os.W_OK):
        raise TargetError(f"{out}: its folder cannot be written to", hint="choose a folder that you may write to")
    if out.is_dir() or (out.exists() and not options["force"]):
        raise TargetError(f"{out} exists already", hint="choose another name, or replace a file with --force")
    check_calibration(options)


def _collect(path: Path, options: Mapping[str, Any]) -> tuple[Samples, dict[str, Sums], list[str]]:
    """(the text, what was found in it, what to say of it)."""
    from mlxquant.run.device import prepare

    with waiting("Opening the model"):
        prepare(options["device"])
        from mlxquant.calibrate.imatrix import float_plan, gguf_sums, importance
        from mlxquant.calibrate.layered import Layered
        from mlxquant.convert.sources import open_source

        opened = open_source(path)
        gguf_sums(opened.config, opened.specs, {})  # refuses now what could not be written later
        model = Layered(opened, float_plan(opened.config, opened.specs))
    with watching() as watch:
        samples = samples_of(path, options, watch)
        found = importance(model, samples, watch, head=options["process_output"])
    notes = [f"{len(opened.quantized)} tensors are quantized in SRC: these are its activations, not the full model's"]
    return samples, gguf_sums(opened.config, opened.specs, found), notes if opened.quantized else []


def _say(
    out: Path, samples: Samples, sums: Mapping[str, Sums], notes: list[str], seconds: float, as_json: bool
) -> None:
    stacks = [entry.counts for entry in sums.values() if len(entry.counts) > 1]
    experts, unseen = sum(map(len, stacks)), sum(int((counts == 0).sum()) for counts in stacks)
    if unseen:
        notes = [*notes, f"{unseen} of {experts} matrices of experts saw no text: all their columns count alike"]
    tokens, nbytes = samples.tokens_BL.size, out.stat().st_size
    if as_json:
        counted = {"entries": len(sums), "experts": experts, "experts_unseen": unseen, "tokens": tokens}
        text = {"text": samples.label, "text_sha256": samples.sha256}
        click.echo(
            json.dumps({"out": str(out), "bytes": nbytes, "seconds": seconds, **counted, **text, "notes": notes})
        )
        return
    for note in notes:
        click.echo(f"  note: {note}")
    click.echo(f"Wrote {out}: {len(sums)} weights, {format_bytes(nbytes)}, in {format_duration(seconds)}.")
    click.echo(f"  {tokens:,} tokens of {samples.label}")
    click.echo(f"Next: mlxquant convert SRC -o NAME.gguf --type Q4_K_M --imatrix {out}")
