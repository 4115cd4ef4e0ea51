"""`convert --bpw`, and `--fit` with a method: bits and group size dealt out tensor by tensor, within a limit."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxquant.cli.calibration_options import rotation_of, samples_of
from mlxquant.cli.progress import watching
from mlxquant.cli.running import refuse_zeros
from mlxquant.cli.sections import SectionOption
from mlxquant.errors import UsageError
from mlxquant.plan.recipe import BEST, RTN, SEARCH
from mlxquant.units import format_bytes

if TYPE_CHECKING:
    from mlxquant.calibrate.layered import Layered
    from mlxquant.convert.sources import OpenSource
    from mlxquant.plan.budget import Choice
    from mlxquant.plan.plan import Plan
    from mlxquant.plan.sensitivities import Sensitivities

BUDGET = "For an MLX folder: bits dealt out tensor by tensor"
_LEAST_BPW, _MOST_BPW = 2.0, 16.0
_SHOWN = 12  # tensors whose format is explained at either end

bpw_option = click.option(
    "--bpw",
    cls=SectionOption,
    section=BUDGET,
    type=click.FloatRange(_LEAST_BPW, _MOST_BPW),
    help="At most so many bits per weight over everything that is written, where they do most. --fit MAC with --method "
    "deals out what MAC has room for.",
)
plan_file_option = click.option(
    "--plan-file",
    cls=SectionOption,
    section=BUDGET,
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="What each tensor costs at each format: read if it is there, else measured and kept.  [default: "
    "OUT.plan.json]",
)


def is_budget(options: Mapping[str, Any]) -> bool:
    """Whether formats are dealt out: by --bpw, or by --fit where a method is named."""
    return options["bpw"] is not None or (options["fit"] is not None and options["method"] is not None)


def check(for_budget: list[str], for_mlx: list[str], for_fit: list[str], options: Mapping[str, Any]) -> None:
    """Raises UsageError for what a budget contradicts, or would not look at."""
    if not is_budget(options):
        if for_budget:
            raise UsageError(f"{for_budget[0]} is for a budget", hint="add --bpw 4.5, or leave it out")
        return
    if options["bpw"] is not None and options["fit"] is not None:
        raise UsageError("--bpw and --fit both say how large it may be", hint="give one of them")
    against = [option for option in for_mlx if option in ("--bits", "--group-size", "--mode", "--recipe")]
    if against:
        raise UsageError(f"a budget chooses formats, and {against[0]} names one", hint=f"leave {against[0]} out")
    if "--for" in for_fit:
        raise UsageError("--for chooses among levels, and a budget has none", hint="leave --for out, or --method")
    if for_fit and "--fit" not in for_fit:
        raise UsageError(f"{for_fit[0]} is for --fit", hint="add --fit 16GB, or leave it out")
    refuse_zeros(options)


def with_budget(opened: OpenSource, plan: Plan, out: Path | None, options: Mapping[str, Any], quiet: bool) -> Plan:
    """The plan with a format for each tensor, within the budget; says what was dealt out, and why.

    Raises PlanError where the budget cannot be met, and as `measure` does.
    """
    from mlxquant.run.device import prepare

    prepare(options["device"])  # before mlx is imported
    from mlxquant.calibrate.layered import Layered
    from mlxquant.plan.budget import budget
    from mlxquant.plan.plan import make_plan

    limit = limit_bytes(opened, plan, options)
    model = Layered(opened, plan, rotation_of(opened, plan, options))
    measured = sensitivities(model, plan, out, options, quiet)
    choice = budget(plan, measured.costs, limit)
    if not quiet:
        say(choice, measured)
    return make_plan(opened.config, opened.specs, choice.settings(plan.settings), opened.quantized)


def limit_bytes(opened: OpenSource, plan: Plan, options: Mapping[str, Any]) -> int:
    from mlxquant.plan.budget import limit_of

    if options["bpw"] is not None:
        return limit_of(plan, options["bpw"])
    from mlxquant.cli.convert_fit import machine_of
    from mlxquant.families.shape import ModelShape
    from mlxquant.fit.answer import asked_of_shape
    from mlxquant.fit.weights import budget_bytes

    shape, machine = ModelShape.from_config(opened.config), machine_of(options["fit"])
    kv_bits = int(options["kv_bits"]) if options["kv_bits"] else None
    return budget_bytes(shape, machine, asked_of_shape(shape, machine, options["context"], kv_bits=kv_bits))


def sensitivities(
    model: Layered, plan: Plan, out: Path | None, options: Mapping[str, Any], quiet: bool
) -> Sensitivities:
    """From the plan file, or measured and kept there. Raises SourceError and PlanError for a file of something else."""
    from mlxquant.calibrate.sensitivity import identity, measure
    from mlxquant.files.reading import read_json_object
    from mlxquant.files.writing import write_whole
    from mlxquant.plan.sensitivities import from_json

    method = {RTN: RTN, SEARCH: SEARCH, "awq": SEARCH, BEST: BEST}.get(plan.settings.method, "gptq")
    file = options["plan_file"] or (out.with_name(f"{out.name}.plan.json") if out else None)
    if file is not None and file.exists():
        found = from_json(read_json_object(file), str(file))
        found.require(identity(model), method, str(file))
        return found
    with watching() as watch, tempfile.TemporaryDirectory(dir=out.parent if out else None) as folder:
        samples = samples_of(model.source.path, options, watch)
        if not quiet:
            click.echo(f"Measuring what each tensor costs, with {samples.label}")
        found = measure(model, samples, method, Path(folder), watch=watch)
    if file is not None:
        write_whole(file, (json.dumps(found.to_json(), indent=1) + "\n").encode())
    return found


def say(choice: Choice, measured: Sensitivities) -> None:
    """The formats by how many weights have them, and which tensors got more or fewer bits, and why."""
    from collections import Counter

    from mlxquant.plan.budget import explain

    weights: Counter[str] = Counter()
    for name in choice.free:
        weights[choice.chosen[name].codec.label] += choice.sizes[name]
    total = sum(weights.values())
    dealt = ", ".join(f"{label} {count / total:.0%}" for label, count in weights.most_common())
    click.echo(f"Dealt out {format_bytes(choice.nbytes)} of {format_bytes(choice.limit_bytes)}: {dealt}")
    click.echo(f"  {choice.bpw:.3f} bits per weight, {1000 * choice.nats:.3g} milli-nats expected")
    for remark in choice.remarks:
        click.echo(f"  note: {remark}")
    reasons = explain(choice, measured)
    shown = reasons if len(reasons) <= 2 * _SHOWN else [*reasons[:_SHOWN], *reasons[-_SHOWN:]]
    for reason in shown:
        click.echo(f"  {reason}")
    if len(shown) < len(reasons):
        click.echo(f"  and {len(reasons) - len(shown)} more between these")
