"""What `generate`, `chat` and `bench` share: options, opening a model, and what is said about it on stderr."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mlxquant.errors import UsageError
from mlxquant.units import format_bytes, format_rate, parse_tokens

if TYPE_CHECKING:
    from mlxquant.run.device import Device
    from mlxquant.run.generate import Stats
    from mlxquant.run.ready import Ready
    from mlxquant.run.sampling import Sampling
    from mlxquant.run.text import Text

F = TypeVar("F", bound=Callable[..., Any])


class Tokens(click.ParamType):
    """A number of tokens: 4096 or 8k."""

    name = "tokens"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        return value if isinstance(value, int) else parse_tokens(value)


_SAMPLING = (
    click.option("--temp", type=float, help="Temperature; 0, the default, takes the most likely token."),
    click.option("--top-p", type=float, help="Draw from the most likely tokens that make up this share. 0: off."),
    click.option("--top-k", type=int, help="Draw from so many most likely tokens. 0: off."),
    click.option("--min-p", type=float, help="Drop tokens less likely than this times the best. 0: off."),
    click.option("--repetition-penalty", type=float, help="Above 1: recent tokens become less likely. 1: off."),
    click.option("--repetition-context", default=20, show_default=True, help="How many tokens are recent."),
    click.option("--seed", type=int, help="The same seed gives the same answer. Default: a new one each time."),
)
_ANSWER = (
    click.option("--stop", "stops", multiple=True, metavar="TEXT", help="End before TEXT. May be repeated."),
    click.option("--context", type=Tokens(), help="Prompt and answer together, such as 8k; memory must suffice."),
)
_ENGINE = (
    click.option("--max-kv-size", type=Tokens(), help="Keep so many tokens in the cache, and the first 4."),
    click.option("--kv-bits", type=click.Choice(["4", "8"]), help="Quantize the cache, where layers can."),
    click.option(
        "--kv-group-size",
        type=click.Choice(["32", "64", "128"]),
        default="64",
        show_default=True,
        help="Group size of the quantized cache; smaller where the head width asks for it.",
    ),
    click.option("--prefill-step", type=Tokens(), help="Prompt tokens fed at once. Default: GPU 2048, CPU 512."),
    click.option(
        "--device",
        type=click.Choice(["auto", "cpu", "gpu"]),
        default="auto",
        show_default=True,
        help="Where to compute.",
    ),
    click.option(
        "--expand",
        type=click.Choice(["auto", "on", "off"]),
        default="auto",
        show_default=True,
        help="Expand weights to float32, on a CPU only, where they fit.",
    ),
    click.option("--wired", is_flag=True, help="Let the GPU wire memory; can panic a Mac."),
    click.option("--force", is_flag=True, help="Run even if the memory budget says that it does not fit."),
    click.option("--revision", help="Branch, tag or commit, when MODEL is a Hub id."),
)


def adder(options: tuple[Callable[[F], F], ...]) -> Callable[[F], F]:
    """A decorator that adds these options, in this order."""

    def add(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return add


sampling_options = adder(_SAMPLING)
engine_options = adder(_ENGINE)
running_options = adder(_ANSWER + _ENGINE)


def sampling_from(options: dict[str, Any], suggested: Mapping[str, Any] = MappingProxyType({})) -> Sampling:
    """Takes its options out of `options`; those not given are as `suggested`, or off."""
    from mlxquant.run.sampling import Sampling

    names = ("top_p", "top_k", "min_p", "repetition_penalty", "repetition_context", "seed")
    given = {"temperature": options.pop("temp")} | {name: options.pop(name) for name in names}
    return Sampling(**{**suggested, **{name: value for name, value in given.items() if value is not None}})


def refuse_zeros(options: Mapping[str, Any]) -> None:
    """Raises UsageError for a context, or chunks of a prompt, of no tokens."""
    if options.get("prefill_step") == 0:
        raise UsageError("--prefill-step 0 makes no headway", hint="use 512 or 2048")
    if options.get("context") == 0:
        raise UsageError("--context 0 has no room for a prompt", hint="use 8k, or leave it out")


def open_text(model: str, options: dict[str, Any]) -> tuple[Path, Device, Text]:
    """Prepares the device (before anything imports MLX), finds MODEL and reads its tokenizer."""
    from mlxquant.cli.progress import waiting
    from mlxquant.cli.resolve import resolve
    from mlxquant.run.device import prepare

    refuse_zeros(options)
    path = resolve(model, options["revision"])
    with waiting(f"Opening {path.name}"):
        device = prepare(options["device"], wired=options["wired"])
        from mlxquant.run.text import Text

        return path, device, Text.load(path)


def open_ready(path: Path, device: Device, text: Text, options: dict[str, Any], context_tokens: int | None) -> Ready:
    """Loads the model within the memory budget."""
    from mlxquant.cli.progress import waiting
    from mlxquant.run.ready import CacheOptions, make_ready

    bits = int(options["kv_bits"]) if options["kv_bits"] else None
    with waiting(f"Loading {path.name}"):
        return make_ready(
            path,
            device,
            text,
            expand=options["expand"],
            context_tokens=context_tokens,
            options=CacheOptions(options["max_kv_size"], bits, int(options["kv_group_size"])),
            prefill_step=options["prefill_step"],
            force=options["force"],
        )


def say_ready(ready: Ready, options: dict[str, Any]) -> None:
    """Notes, and the cache's table when something was asked of the cache."""
    for note in ready.notes:
        click.secho(note, dim=True, err=True)
    if options["kv_bits"] or options["max_kv_size"]:
        for layers, kind, reason, per_token in ready.plan.table():
            click.secho(
                f"cache of layer {layers}: {kind} ({reason}), {format_bytes(per_token)} per token",
                dim=True,
                err=True,
            )


def stats_line(stats: Stats, finish: str | None = None, reused: int = 0) -> str:
    """'prompt 12 tokens at 280 tok/s | 64 tokens at 19.7 tok/s | first after 0.1 s | stopped by eos'"""
    parts = [f"prompt {stats.prompt_tokens} tokens at {format_rate(stats.prefill_rate)}"]
    if reused:
        parts[0] += f" ({reused} more reused)"
    parts.append(f"answer {stats.generated_tokens} tokens at {format_rate(stats.decode_rate)}")
    parts.append(f"first after {stats.prefill_s:.2f} s")
    if finish:
        parts.append(f"ended by {finish}")
    return " | ".join(parts)
