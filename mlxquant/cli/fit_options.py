"""The options of `mlxquant fit`, and what they say against each other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from mlxquant.cli.running import Tokens, adder, refuse_zeros
from mlxquant.cli.sections import SectionOption
from mlxquant.errors import UsageError
from mlxquant.fit.decision import USES

F = TypeVar("F", bound=Callable[..., Any])

MACHINE, OUTPUT, SHAPE = "The Mac", "The answer", "A model of this shape, instead of MODEL"
FORMATS = ("mlx", "gguf", "either")
SHAPE_NAMES = ("params", "layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "vocab", "experts", "active")
_COUNT = click.IntRange(1)


def _option(section: str, *names: str, **settings: Any) -> Callable[[F], F]:
    return click.option(*names, cls=SectionOption, section=section, **settings)


_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.option("--context", type=Tokens(), help="Prompt and answer together.  [default: 8k, or the model's if less]"),
    click.option("--kv-bits", type=click.Choice(["4", "8"]), help="Quantize the cache, where layers can."),
    click.option("--prefill-step", type=Tokens(), help="Prompt tokens fed at once. Default: GPU 2048, CPU 512."),
    click.option("--all", "every", is_flag=True, help="Every level that can be written, not only the usual ones."),
    click.option("--revision", help="Branch, tag or commit, when MODEL is a Hub id."),
    _option(MACHINE, "--mac", metavar="TEXT", help="Another Mac than this one: 'M2 8GB', 'M3 Max 40-core 64GB'."),
    _option(MACHINE, "--chip", metavar="NAME", help="Its chip alone: M3-Pro."),
    _option(MACHINE, "--ram", metavar="SIZE", help="Its memory, as Apple prints it: 16GB."),
    _option(MACHINE, "--gpu-cores", type=_COUNT, help="Its GPU cores, where the chip is sold with several."),
    _option(MACHINE, "--calibrate", is_flag=True, help="Time MODEL here, and keep this machine's own constants."),
    _option(OUTPUT, "--pick", is_flag=True, help="Name one level, why, and the command to run."),
    _option(OUTPUT, "--for", "use", type=click.Choice(sorted(USES)), help="What for.  [default: chat]"),
    _option(OUTPUT, "--format", "form", type=click.Choice(FORMATS), help="What --pick chooses from.  [default: mlx]"),
    _option(OUTPUT, "--table", is_flag=True, help="The longest context of each level on Macs of 8 to 128 GB."),
    _option(OUTPUT, "--plot", type=click.Path(path_type=Path), metavar="FILE", help="Draw that table: .png or .svg."),
    _option(OUTPUT, "--json", "as_json", is_flag=True, help="Print one JSON object."),
    _option(SHAPE, "--params", metavar="COUNT", help="Parameters: 7B."),
    _option(SHAPE, "--layers", type=_COUNT, help="What is left out is as in models of that size."),
    _option(SHAPE, "--hidden", type=_COUNT, help="Width of the residual stream."),
    _option(SHAPE, "--heads", type=_COUNT, help="Attention heads."),
    _option(SHAPE, "--kv-heads", type=_COUNT, help="Heads of keys and values."),
    _option(SHAPE, "--head-dim", type=_COUNT, help="Width of one head."),
    _option(SHAPE, "--ffn", type=_COUNT, help="Width of the feed-forward layer, or of one expert."),
    _option(SHAPE, "--vocab", type=_COUNT, help="Tokens."),
    _option(SHAPE, "--experts", type=click.IntRange(2), help="Experts of a layer."),
    _option(SHAPE, "--active", type=_COUNT, help="Experts that one token asks."),
)  # fmt: skip


fit_options = adder(_OPTIONS)


def check(model: str | None, options: dict[str, Any]) -> None:
    """What the command line contradicts itself in, before anything is fetched. Raises UsageError."""
    shape = [f"--{name.replace('_', '-')}" for name in SHAPE_NAMES if options[name] is not None]
    if (model is None) == (not shape):
        found = f"MODEL is {model}, and {shape[0]} describes another" if shape else "no MODEL"
        raise UsageError(found, hint="give a Hub id, a folder, a .gguf file, or --params 7B --layers 32")
    if shape and options["params"] is None:
        raise UsageError(f"{shape[0]} without --params", hint="write it like --params 7B --layers 32")
    refuse_zeros(options)
    elsewhere = [f"--{name}" for name in ("mac", "chip", "ram") if options[name] is not None]
    if options["calibrate"] and (shape or elsewhere):
        found = f"--calibrate times a model on this machine, and {(elsewhere or shape)[0]} describes one"
        raise UsageError(found, hint="give a folder or a .gguf file, and leave the description out")
    _answers(options, elsewhere)


def _answers(options: dict[str, Any], elsewhere: list[str]) -> None:
    """One answer at a time, and nothing asked that it would pass over."""
    grid = next((f"--{name}" for name in ("table", "plot") if options[name]), None)
    if options["calibrate"] and (grid or options["pick"]):
        raise UsageError(f"--calibrate times, and {grid or '--pick'} reckons", hint="calibrate first, then ask")
    if options["pick"] and grid:
        raise UsageError("--pick is for one Mac, --table and --plot are for many", hint="leave one of them out")
    if grid and elsewhere:
        raise UsageError(f"{grid} is of Macs of 8 to 128 GB, and {elsewhere[0]} names one", hint=f"leave {grid} out")
    unused = next((f"--{name}" for name, key in (("for", "use"), ("format", "form")) if options[key]), None)
    if unused and not options["pick"]:
        raise UsageError(f"{unused} is for --pick", hint=f"add --pick, or leave {unused} out")
