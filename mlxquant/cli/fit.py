"""`mlxquant fit MODEL`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from mlxquant.cli.fit_options import FORMATS, check, fit_options
from mlxquant.cli.sections import SectionCommand
from mlxquant.fit.decision import DEFAULT_USE

if TYPE_CHECKING:
    from mlxquant.fit.subject import Subject
    from mlxquant.fit.values import Asked
    from mlxquant.machine import Machine


@click.command(cls=SectionCommand)
@click.argument("model", metavar="MODEL", required=False)
@fit_options
def command(model: str | None, **options: Any) -> None:
    """Say whether MODEL fits a Mac, how fast it will be, and which level to take, before anything is downloaded.

    MODEL is a Hub id (its headers alone are fetched), a folder, a .gguf file or a config.json; or its shape is given.
    This machine is meant, unless another is described.
    """
    check(model, options)
    if options["plot"]:
        from mlxquant.fit.plot import check_plot

        check_plot(options["plot"])
    if options["calibrate"]:
        from mlxquant.cli.fit_calibrate import calibrate

        calibrate(str(model), options)
        return
    from mlxquant.cli.fit_subject import subject_of
    from mlxquant.fit.answer import asked_of

    grid = options["table"] or options["plot"]
    machines = usual_macs() if grid else [machine_of(options)]
    subject = subject_of(model, options)
    kv_bits = int(options["kv_bits"]) if options["kv_bits"] else None
    words = {"kv_bits": kv_bits, "chunk_tokens": options["prefill_step"]}
    asked = asked_of(subject, machines[0], options["context"], **words)
    if grid:
        say_grid(subject, machines, asked, options)
    else:
        source = model if model and not subject.remarks else "MODEL"  # what convert can be given
        say_answer(subject, machines[0], asked, options, source)


def machine_of(options: dict[str, Any]) -> Machine:
    """The Mac that is described, else this computer."""
    from mlxquant.machine import described, probe

    words = {name: options[name] for name in ("mac", "chip", "ram", "gpu_cores")}
    return described(**words) if any(value is not None for value in words.values()) else probe()


def usual_macs() -> list[Machine]:
    """Those of the grid."""
    from mlxquant.fit.answer import RAM_GIB
    from mlxquant.machine import described

    return [described(ram=f"{gib}GB") for gib in RAM_GIB]


def say_answer(subject: Subject, machine: Machine, asked: Asked, options: dict[str, Any], source: str) -> None:
    from mlxquant.fit.answer import answer
    from mlxquant.fit.calibration import load

    found = answer(subject, machine, asked, every=options["every"], own=load(machine))
    chosen = None
    if options["pick"]:
        from mlxquant.fit.pick import pick

        wanted: dict[str, Any] = {"name": source, "form": options["form"] or FORMATS[0], "kv_bits": asked.kv_bits}
        chosen = pick(found.rows, options["use"] or DEFAULT_USE, machine, asked.context_tokens, **wanted)
    if options["as_json"]:
        click.echo(json.dumps(found.to_json() | ({"pick": chosen.to_json()} if chosen else {})))
        return
    from mlxquant.cli.fit_table import show

    show(found, chosen)


def say_grid(subject: Subject, machines: list[Machine], asked: Asked, options: dict[str, Any]) -> None:
    from mlxquant.fit.answer import grid

    found = grid(subject, machines, asked, every=options["every"])
    if options["as_json"]:
        click.echo(json.dumps(found.to_json()))
    else:
        from mlxquant.cli.fit_table import show_grid

        show_grid(found)
    if options["plot"]:
        from mlxquant.fit.plot import plot

        plot(found, options["plot"])
