"""`mlxquant convert --fit`: the level is chosen by memory and use, from headers, before anything is pulled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxquant.cli.converting import Wish, is_gguf
from mlxquant.cli.running import Tokens, adder, refuse_zeros
from mlxquant.cli.sections import SectionOption
from mlxquant.errors import MemoryBudgetError, PlanError, UsageError
from mlxquant.fit.decision import DEFAULT_USE, USES

if TYPE_CHECKING:
    from mlxquant.fit.pick import Pick
    from mlxquant.fit.values import Format, Level
    from mlxquant.machine import Machine

FIT = "For a Mac: the level is chosen, as `mlxquant fit --pick` would"
THIS = "this"
# What says nothing of the format, so that --fit can stand beside it.
_BESIDE = ("--imatrix", "--split-max-size", "--pre", "--modelfile")
# Option of `convert` -> name of its parameter, of those that a level is made of (Level.options).
_PARAMETERS = {
    "--bits": "bits",
    "--group-size": "group_size",
    "--mode": "mode",
    "--recipe": "recipe",
    "--type": "file_type",
}
_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.option(
        "--fit",
        cls=SectionOption,
        section=FIT,
        metavar="MAC",
        help="Choose --bits, or --type of a .gguf, so that it runs on MAC: 16GB, 'M2 8GB', or `this` one.",
    ),
    click.option(
        "--context",
        cls=SectionOption,
        section=FIT,
        type=Tokens(),
        help="Prompt and answer together that must fit, too.  [default: 8k, or the model's if less]",
    ),
    click.option(
        "--kv-bits",
        cls=SectionOption,
        section=FIT,
        type=click.Choice(["4", "8"]),
        help="Reckon with a quantized cache; run it with the same --kv-bits.",
    ),
    click.option(
        "--for",
        "use",
        cls=SectionOption,
        section=FIT,
        type=click.Choice(sorted(USES)),
        help="What for: code and extraction want more bits, chat and writing speed.  [default: chat]",
    ),
)

fit_options = adder(_OPTIONS)


def check(out: Path | None, for_fit: Sequence[str], for_mlx: Sequence[str], for_gguf: Sequence[str]) -> None:
    """What --fit contradicts, before anything is fetched. Raises UsageError."""
    if "--fit" not in for_fit:
        raise UsageError(f"{for_fit[0]} is for --fit", hint="add --fit 16GB, or leave it out")
    against = [option for option in (*for_mlx, *for_gguf) if option not in _BESIDE]
    if against:
        raise UsageError(f"--fit chooses the format, and {against[0]} names one", hint="leave one of them out")
    if for_gguf and not is_gguf(out):
        raise UsageError(f"{for_gguf[0]} is for GGUF files", hint="write -o NAME.gguf, or leave it out")


def chosen_options(wish: Wish, out: Path | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """`options` with the level that fits, as if it had been given. Says in one line what was chosen, and why.

    Raises UsageError (a Mac that there is not, a contradiction), MemoryBudgetError where nothing good enough fits, and
    PlanError for a model that `convert` would not quantize again.
    """
    if options["allow_requantize"]:
        raise UsageError("--fit reckons with a first loss only", hint="leave --allow-requantize out, or name a level")
    refuse_zeros(options)
    from mlxquant.fit.pick_words import WOULD_FIT

    machine = machine_of(options["fit"])
    found = _pick(wish, out, options, machine)
    if found.row is None:
        message, *rest = found.why
        hint = " ".join(rest).removeprefix(WOULD_FIT)
        raise MemoryBudgetError(f"{wish.source}: {message.removesuffix('.')}", hint=hint or None)
    if not wish.as_json:
        click.echo(f"For {found.use}: {found.why[0]}")
    return {**options, **_as_parameters(found.row.level)}


def machine_of(words: str) -> Machine:
    from mlxquant.machine import described, probe

    return probe() if words.strip().lower() == THIS else described(words)


def _pick(wish: Wish, out: Path | None, options: Mapping[str, Any], machine: Machine) -> Pick:
    from mlxquant.cli.fit_subject import subject_of
    from mlxquant.fit.answer import answer, asked_of
    from mlxquant.fit.calibration import load
    from mlxquant.fit.pick import pick

    form: Format = "gguf" if is_gguf(out) else "mlx"
    kv_bits = int(options["kv_bits"]) if options["kv_bits"] else None
    subject = subject_of(wish.source, {"revision": wish.revision})
    asked = asked_of(subject, machine, options["context"], kv_bits=kv_bits)
    found = answer(subject, machine, asked, own=load(machine))
    # A model as it is needs no conversion.
    rows = [row for row in found.rows if row.level.options and row.level.format == form]
    if not rows:
        why = next((reason for key, reason in found.refused.items() if key.startswith(form)), "it has no levels")
        raise PlanError(f"{wish.source}: --fit has nothing to choose from: {why}", hint="mlxquant fit says what it is")
    return pick(
        rows, options["use"] or DEFAULT_USE, machine, asked.context_tokens, name=wish.source, form=form, kv_bits=kv_bits
    )


def _as_parameters(level: Level) -> dict[str, str]:
    words = dict(zip(level.options[::2], level.options[1::2], strict=True))
    return {_PARAMETERS[option]: value for option, value in words.items()}
