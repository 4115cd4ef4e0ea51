"""`mlxquant generate MODEL -p PROMPT`."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click

from mlxquant.cli.running import (
    open_ready,
    open_text,
    running_options,
    sampling_from,
    sampling_options,
    say_ready,
    stats_line,
)
from mlxquant.errors import UsageError

if TYPE_CHECKING:
    from mlxquant.run.generate import Generation
    from mlxquant.run.ready import Ready
    from mlxquant.run.text import Text


@click.command()
@click.argument("model")
@click.option("-p", "--prompt", help="What to continue or answer; `-` or nothing reads it from stdin.")
@click.option("-n", "--max-tokens", type=int, default=256, show_default=True, help="Longest answer.")
@click.option("--system", help="System prompt.")
@click.option("--no-template", is_flag=True, help="Continue the bare text instead of answering in a chat turn.")
@sampling_options
@running_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with the text, tokens and stats.")
def command(
    model: str,
    prompt: str | None,
    max_tokens: int,
    system: str | None,
    no_template: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Answer or continue one prompt with MODEL: a folder, a .gguf file or a Hub id.

    The text goes to stdout as it is made, one line of stats to stderr. Ctrl-C ends the answer. Whatever the model's
    generation_config.json says, the most likely tokens are taken unless --temp is given, so that a script's answers
    are the same each time.
    """
    if max_tokens < 1:
        raise UsageError(f"{max_tokens} tokens cannot be generated", hint="use --max-tokens 1 or more")
    if no_template and system:
        raise UsageError("--system belongs to a chat template", hint="leave out --system or --no-template")
    sampling = sampling_from(options)
    prompt = _prompt(prompt)
    path, device, text = open_text(model, options)
    tokens = encode(text, prompt, system, no_template)
    needed = len(tokens) + max_tokens
    if options["context"] and needed > options["context"]:
        max_tokens = options["context"] - len(tokens)
        if max_tokens < 1:
            raise UsageError(
                f"the prompt has {len(tokens)} tokens, --context is {options['context']}",
                hint="make --context longer",
            )
    ready = open_ready(path, device, text, options, options["context"] or needed)
    if not as_json:
        say_ready(ready, options)
    from mlxquant.cli.progress import PromptBar
    from mlxquant.run.generate import generate
    from mlxquant.run.interrupt import interruptible

    with interruptible() as stop, PromptBar() as bar:
        run = generate(
            ready.loaded.model, tokens, ready.plan.make(), sampling, max_tokens=max_tokens,
            eos_ids=ready.text.eos_ids, prefill_step=ready.prefill_step, stop=stop, on_progress=bar,
        )  # fmt: skip
        report(*stream(run, ready, options["stops"], as_json), as_json)


def encode(text: Text, prompt: str, system: str | None, no_template: bool) -> list[int]:
    """The prompt's tokens; a model without a template continues the bare text."""
    if no_template or not text.has_template:
        if system:
            raise UsageError(f"{text.name}: has no chat template for a system prompt", hint="leave --system out")
        tokens = text.encode(prompt)
    else:
        messages = [{"role": "system", "content": system}] if system else []
        tokens = text.encode(text.render([*messages, {"role": "user", "content": prompt}]))
    if not tokens:
        raise UsageError("the prompt is empty", hint="give one with -p")
    return tokens


def stream(
    run: Generation, ready: Ready, stops: tuple[str, ...], quiet: bool
) -> tuple[Generation, list[int], str, bool]:
    """Prints the text as it comes; returns run, tokens, text and whether a stop string ended it."""
    from mlxquant.run.text import StopStrings

    decoder, guard = ready.text.stream(), StopStrings(stops)
    ids: list[int] = []
    pieces: list[str] = []

    def give(piece: str) -> None:
        pieces.append(piece)
        if not quiet:
            click.echo(piece, nl=False)

    for token in run:
        ids.append(token.id)
        give(guard.feed(decoder.feed(token.id)))
        if guard.hit:
            run.close()
            break
    give(guard.feed(decoder.finish()) + guard.finish())
    return run, ids, "".join(pieces), guard.hit is not None


def report(run: Generation, ids: list[int], text: str, stopped: bool, as_json: bool) -> None:
    finish = "stop string" if stopped else run.finish
    if not as_json:
        click.echo()
        click.secho(stats_line(run.stats, finish), dim=True, err=True)
        return
    stats = run.stats
    click.echo(
        json.dumps(
            {
                "text": text,
                "tokens": ids,
                "finish": finish,
                "prompt_tokens": stats.prompt_tokens,
                "generated_tokens": stats.generated_tokens,
                "prefill_s": stats.prefill_s,
                "decode_s": stats.decode_s,
                "prefill_tokens_per_s": stats.prefill_rate,
                "decode_tokens_per_s": stats.decode_rate,
            },
            ensure_ascii=False,
        )
    )


def _prompt(given: str | None) -> str:
    if given is None or given == "-":
        if sys.stdin.isatty():
            raise UsageError("there is no prompt", hint="give one with -p, or pipe it in")
        given = sys.stdin.read()
    if not given.strip():
        raise UsageError("the prompt is empty", hint="give one with -p, or pipe it in")
    return given
