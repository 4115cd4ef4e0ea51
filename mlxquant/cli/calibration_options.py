"""The options that say which text calibrates: shared by `imatrix` and `convert`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mlxquant.cli.running import Tokens, adder
from mlxquant.cli.sections import SectionOption

if TYPE_CHECKING:
    from mlxquant.calibrate.rotate import Rotation
    from mlxquant.calibrate.values import Samples
    from mlxquant.convert.sources import OpenSource
    from mlxquant.measure.runner import Watch
    from mlxquant.plan.plan import Plan

F = TypeVar("F", bound=Callable[..., Any])

DEFAULT = "builtin"  # where a method needs text and none is named


def calibration_options(section: str = "") -> Callable[[F], F]:
    """A decorator that adds --calibration (None unless given), --samples, --sequence-length and --seed, under `section`
    of the help."""

    def option(*names: str, **settings: Any) -> Callable[[Any], Any]:
        return click.option(*names, cls=SectionOption, section=section, show_default=True, **settings)

    return adder(
        (
            option(
                "--calibration",
                metavar="FILE|DATASET|builtin|self",
                help="What the model reads: a text file, a Hub dataset (org/name), what every Python ships, or what "
                f"the model itself writes.  [default: {DEFAULT}]",
            ),
            option("--samples", type=click.IntRange(1), default=128, help="Pieces, from random places of the text."),
            option("--sequence-length", type=Tokens(), default=512, help="Tokens of each."),
            option("--seed", type=click.IntRange(0), default=0, help="The same seed takes the same pieces."),
        )
    )


def check_calibration(options: Mapping[str, Any]) -> None:
    """What can be refused before a model is pulled. Raises UsageError, SourceError and HubError."""
    spec = options["calibration"] or DEFAULT
    if spec not in (DEFAULT, "self"):
        from mlxquant.measure.corpus import load_corpus

        load_corpus(spec)


def samples_of(path: Path, options: Mapping[str, Any], watch: Watch | None = None) -> Samples:
    """The samples that the options ask for, in the tokens of the model at `path`, which is read for --calibration self
    alone. Prepares the device, so it comes before any other use of MLX. Raises as calibrate/text.py `calibration`.
    """
    from mlxquant.run.device import prepare

    device = prepare(options.get("device") or "auto")
    from mlxquant.calibrate.self_text import generator
    from mlxquant.calibrate.text import calibration
    from mlxquant.run.text import Text

    text = Text.load(path)
    return calibration(
        options["calibration"] or DEFAULT,
        text,
        options["samples"],
        options["sequence_length"],
        options["seed"],
        generator(path, device, text, watch),
    )


def rotation_of(opened: OpenSource, plan: Plan, options: Mapping[str, Any]) -> Rotation | None:
    """What --rotate asks for, as the plan's settings have it. Raises UnsupportedError where it does not hold."""
    from mlxquant.calibrate.rotate import Rotation

    return Rotation.of(opened.config, plan, options["seed"]) if plan.settings.rotate else None
