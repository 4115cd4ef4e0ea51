"""`mlxquant convert` with a method that looks at text: calibrate, choose codes layer by layer, say what that gained."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import click

from mlxquant.cli.calibration_options import rotation_of, samples_of
from mlxquant.cli.convert_mlx import print_summary
from mlxquant.cli.converting import Wish, print_columns, print_written, stopped_in_one_line
from mlxquant.cli.progress import watching
from mlxquant.machine import peak_memory_bytes
from mlxquant.units import format_bytes

if TYPE_CHECKING:
    from mlxquant.calibrate.best import Trial
    from mlxquant.calibrate.choose import Record
    from mlxquant.convert.sources import OpenSource
    from mlxquant.plan.plan import Plan


def convert_calibrated(opened: OpenSource, plan: Plan, out: Path, wish: Wish, options: Mapping[str, Any]) -> None:
    """`options`: those of cli/calibration_options.py, and --device. Raises UsageError for text that is too short."""
    from mlxquant.run.device import prepare

    prepare(options["device"])  # before mlx is imported
    from mlxquant.calibrate.recipes import RECIPES
    from mlxquant.calibrate.to_mlx import to_mlx

    began = time.perf_counter()
    with stopped_in_one_line(out), watching() as watch:
        samples = samples_of(opened.path, options, watch)
        if not wish.as_json:
            print_summary(plan)
            click.echo(f"Calibrating with {samples.label}")
        written = to_mlx(
            opened,
            plan,
            out,
            samples,
            RECIPES[plan.settings.method],
            rotation=rotation_of(opened, plan, options),
            resume=wish.resume or None,
            restart=wish.restart,
            force=wish.force,
            limit_s=60 * options["time_limit"] if options["time_limit"] else None,
            watch=watch,
        )
    seconds, peak = time.perf_counter() - began, peak_memory_bytes()
    if wish.as_json:
        facts = {"out": str(out), "seconds": seconds, "bytes": plan.nbytes, "bpw": plan.bpw, "peak_bytes": peak}
        tensors = [asdict(record) for record in written.records]
        tried = [{"recipe": trial.recipe.label, "held_out_nats": trial.nats} for trial in written.trials]
        how = {"calibration": samples.label, "recipe": written.recipe.label, "trials": tried}
        click.echo(json.dumps(facts | how | {"tensors": tensors}))
        return
    print_trials(written.trials)
    print_gain(written.records)
    print_written(out, plan.nbytes, plan.bpw, seconds)
    click.echo(f"Peak memory {format_bytes(peak)}.")


def print_trials(trials: Sequence[Trial]) -> None:
    """What was tried and chosen, by what it cost held-out text."""
    if trials:
        tried = ", ".join(f"{trial.recipe.label} {1000 * trial.nats:.4g}" for trial in trials)
        click.echo(f"Chose {trials[0].recipe.label}. Milli-nats of held-out text, first layers only: {tried}")


def print_gain(records: Sequence[Record]) -> None:
    """The output's error by kind of weight, before and after; then everything that went otherwise than asked."""
    kinds: dict[str, list[Record]] = {}
    for record in records:
        if record.rounding:
            kinds.setdefault(record.name.removesuffix(".weight").rpartition(".")[2], []).append(record)
    rows = [("weight", "number", "rounded", "chosen", "of it")]
    for kind, some in kinds.items():
        rounding, error = (fmean(values) for values in zip(*((r.rounding, r.error) for r in some), strict=True))
        rows.append((kind, str(len(some)), f"{rounding:.2e}", f"{error:.2e}", f"{error / rounding:.0%}"))
    click.echo("Squared error of what is computed, as a share of it:")
    print_columns(rows, numbers=4)
    for record in records:
        if record.note:
            click.echo(f"  note: {record.name}: {record.note}")
