"""`mlxquant convert SRC -o OUT`: an MLX folder, or with -o NAME.gguf a GGUF file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from mlxquant.cli import convert_budget, convert_fit
from mlxquant.cli.calibration_options import calibration_options
from mlxquant.cli.converting import Wish, is_gguf
from mlxquant.cli.sections import SectionCommand, SectionOption, given
from mlxquant.codecs.spec import AFFINE_BITS, AFFINE_GROUP_SIZES, MODES
from mlxquant.errors import UsageError
from mlxquant.plan.gguf_types import FILE_TYPES
from mlxquant.plan.recipe import BEST, METHODS, RECIPES, RTN, SEARCH
from mlxquant.tensors import FLOAT_CODES

MLX, GGUF = "For an MLX folder", "For a GGUF file"
TEXT = "For an MLX folder: codes chosen by what text does in the model"


@click.command(cls=SectionCommand)
@click.argument("source", metavar="SRC")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="The MLX folder, or NAME.gguf, to write.")
@click.option("--revision", help="Branch, tag or commit, when SRC is a Hub id.")
@click.option("--dry-run", is_flag=True, help="Print the plan, tensor by tensor, and write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan or the result as one JSON object.")
@click.option("--resume", is_flag=True, help="Go on with OUT.partial; an error if there is none to go on with.")
@click.option("--restart", is_flag=True, help="Throw OUT.partial away and begin again.")
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
@click.option("--allow-requantize", is_flag=True, help="Quantize again what is quantized in SRC: a second loss.")
@click.option(
    "--bits",
    cls=SectionOption,
    section=MLX,
    type=click.Choice([str(b) for b in AFFINE_BITS]),
    help="Bits per weight code.  [default: 4]",
)
@click.option(
    "--group-size",
    cls=SectionOption,
    section=MLX,
    type=click.Choice([str(g) for g in AFFINE_GROUP_SIZES]),
    help="Weights that share a scale and a bias.  [default: 64]",
)
@click.option(
    "--mode",
    cls=SectionOption,
    section=MLX,
    type=click.Choice(MODES),
    default="affine",
    show_default=True,
    help="MLX number format.",
)
@click.option(
    "--recipe",
    cls=SectionOption,
    section=MLX,
    type=click.Choice(RECIPES),
    help="Who gets more bits. uniform and mixed_* write what stock mlx_lm.convert writes; repack keeps a GGUF file's "
    "own codes.  [default: balanced; repack for a quantized .gguf without other format options]",
)
@click.option(
    "--method",
    cls=SectionOption,
    section=MLX,
    type=click.Choice(METHODS),
    help="Who chooses codes, scales and biases. rtn: the range of each group, rounding to nearest, as mlx_lm.convert; "
    "search: least squared error, in the same arrays; awq, gptq, best: by text, see below.  [default: search; "
    "rtn for uniform, mixed_*, nvfp4, mxfp8 and 2 bits]",
)
@click.option(
    "--dtype",
    cls=SectionOption,
    section=MLX,
    type=click.Choice(list(FLOAT_CODES)),
    help="Dtype of what stays float.  [default: the source's]",
)
@click.option(
    "--set",
    "sets",
    cls=SectionOption,
    section=MLX,
    multiple=True,
    metavar="REGEX=CODEC",
    help="Codec for matching tensors: 8g32, mxfp4, keep... Repeatable; the first match wins.",
)
@click.option(
    "--type",
    "file_type",
    cls=SectionOption,
    section=GGUF,
    metavar="TYPE",
    help=f"llama.cpp's file type, upper or lower case: {', '.join(FILE_TYPES)}.",
)
@click.option(
    "--tensor-type",
    "tensor_types",
    cls=SectionOption,
    section=GGUF,
    multiple=True,
    metavar="REGEX=TYPE",
    help="Type of matching tensors, by GGUF name: ffn_down=Q6_K. Repeatable; the first match wins.",
)
@click.option("--output-tensor-type", cls=SectionOption, section=GGUF, metavar="TYPE", help="Type of output.weight.")
@click.option(
    "--token-embedding-type", cls=SectionOption, section=GGUF, metavar="TYPE", help="Type of token_embd.weight."
)
@click.option("--pure", cls=SectionOption, section=GGUF, is_flag=True, help="One type for all: no mixture.")
@click.option(
    "--imatrix",
    cls=SectionOption,
    section=GGUF,
    metavar="FILE",
    help="Importance matrix by `mlxquant imatrix` or llama-imatrix, GGUF or .dat.",
)
@click.option(
    "--split-max-size",
    cls=SectionOption,
    section=GGUF,
    metavar="SIZE",
    help="Several files NAME-00001-of-0000N.gguf of at most SIZE of weights each: 5G, 500M or bytes.",
)
@click.option(
    "--pre",
    cls=SectionOption,
    section=GGUF,
    metavar="NAME",
    help="llama.cpp's name of the pre-tokenizer, where tokenizer.json does not tell.",
)
@click.option("--modelfile", cls=SectionOption, section=GGUF, is_flag=True, help="Write Ollama's Modelfile beside it.")
@click.option(
    "--rotate",
    cls=SectionOption,
    section=TEXT,
    is_flag=True,
    help="Put the residual stream and the value heads into another basis first: the same function, fewer outliers. A "
    "tied head becomes a matrix of its own.",
)
@calibration_options(TEXT)
@click.option(
    "--device",
    cls=SectionOption,
    section=TEXT,
    type=click.Choice(["auto", "cpu", "gpu"]),
    default="auto",
    show_default=True,
    help="Where the model runs while it is calibrated.",
)
@click.option(
    "--time-limit",
    cls=SectionOption,
    section=TEXT,
    type=click.FloatRange(0, min_open=True),
    metavar="MINUTES",
    help="What best may spend on trying recipes; it always tries one.  [default: none]",
)
@convert_budget.bpw_option
@convert_budget.plan_file_option
@convert_fit.fit_options
@click.pass_context
def command(
    ctx: click.Context,
    /,
    source: str,
    out: Path | None,
    revision: str | None,
    dry_run: bool,
    as_json: bool,
    resume: bool,
    restart: bool,
    force: bool,
    **options: Any,
) -> None:
    """Quantize SRC (a Hugging Face folder, an MLX folder, a Hub id or a .gguf file) into OUT.

    OUT is an MLX folder, which loads in stock mlx-lm and LM Studio; or with -o NAME.gguf --type TYPE a GGUF file, which
    loads in llama.cpp, Ollama and LM Studio. A conversion that was stopped goes on where it was when the same command
    is given again; OUT appears only when it is complete.
    """
    if resume and restart:
        raise UsageError("--resume and --restart contradict each other", hint="give one of them")
    if out is None and not dry_run:
        raise UsageError("no output", hint="add -o FOLDER or -o NAME.gguf, or --dry-run to see the plan only")
    wish = Wish(source, revision, dry_run, as_json, resume, restart, force)
    for_mlx, for_gguf, for_fit = given(ctx, MLX), given(ctx, GGUF), given(ctx, convert_fit.FIT)
    for_text = given(ctx, TEXT)
    for_budget = given(ctx, convert_budget.BUDGET)
    convert_budget.check(for_budget, for_mlx, for_fit, options)
    budget = convert_budget.is_budget(options)
    if budget:
        options["method"] = options["method"] or BEST
    if for_fit and not budget:
        convert_fit.check(out, for_fit, for_mlx, for_gguf)
        options = convert_fit.chosen_options(wish, out, options)
        to_gguf = is_gguf(out)
    else:
        to_gguf = wants_gguf(out, [*for_mlx, *for_text, *for_budget, *for_fit], for_gguf)
    if to_gguf:
        from mlxquant.cli.convert_gguf import convert_gguf

        convert_gguf(wish, out, options)
    else:
        from mlxquant.cli.convert_mlx import convert_mlx

        if not budget:  # which measures with text, whatever the method
            refuse_unread_text(for_text, options["method"])
        formatted = bool({"--bits", "--group-size", "--mode", "--dtype"} & set(for_mlx)) or bool(for_fit)
        convert_mlx(wish, out, options, formatted)


def refuse_unread_text(for_text: Sequence[str], method: str | None) -> None:
    """Raises UsageError for text that no method would look at."""
    if not for_text:
        return
    if method in (None, RTN):
        given_method = f"--method {method} does not" if method else "there is no --method"
        raise UsageError(
            f"{for_text[0]} is for methods that look at text, and {given_method}",
            hint="add --method gptq or best, or leave it out",
        )
    if method == SEARCH and "--calibration" not in for_text:
        raise UsageError(
            f"{for_text[0]}: --method search looks at text only where some is named",
            hint="add --calibration builtin or a file, or leave it out",
        )


def wants_gguf(out: Path | None, for_mlx: Sequence[str], for_gguf: Sequence[str]) -> bool:
    """Which of the two outputs the command line means. Raises UsageError where it means both, or neither fully."""
    is_file = is_gguf(out)
    typed = "--type" in for_gguf
    if is_file and not typed:
        raise UsageError(f"{out}: a GGUF file needs a --type", hint="add --type Q4_K_M, or leave .gguf out for MLX")
    if typed and for_mlx:
        raise UsageError(
            f"{for_mlx[0]} is for MLX folders, and --type is for GGUF files",
            hint=f"leave {for_mlx[0]} out (--tensor-type chooses single tensors' types), or --type for an MLX folder",
        )
    if typed and out is not None and not is_file:
        raise UsageError(
            f"--type is for GGUF files, and {out} does not end in .gguf",
            hint=f"write -o {out}.gguf, or leave --type out for an MLX folder",
        )
    if for_gguf and not typed:
        raise UsageError(f"{for_gguf[0]} is for GGUF files", hint="add -o NAME.gguf --type Q4_K_M, or leave it out")
    return typed
