"""`mlxquant verify OUT [--source SRC]`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import click

from mlxquant.errors import UsageError, VerifyError

# Below this share of same best tokens, what was written rightly is still hardly the same model.
COARSE_TOP1 = 0.5


@click.command()
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--source", metavar="SRC", help="What OUT was made from: a folder, a .gguf file or a Hub id.")
@click.option("--revision", help="Branch, tag or commit, when SRC is a Hub id.")
@click.option("--no-logits", is_flag=True, help="Skip the run of both models on a short prompt (MLX folders).")
@click.option("--imatrix", metavar="FILE", help="The importance matrix that OUT was made with (GGUF files, --source).")
@click.option("--json", "as_json", is_flag=True, help="Print the checks as one JSON object.")
def command(
    out: Path, source: str | None, revision: str | None, no_logits: bool, imatrix: str | None, as_json: bool
) -> None:
    """Prove that OUT is what its plan says, and that it still agrees with its source.

    An MLX folder without --source: specs, config, checksums, head, EOS. With it, also: every weight within its
    format's bound, norms, tokenizer bytes, and the logits of both models on a short prompt.

    A GGUF file without --source: keys, types by llama.cpp's rules, checksums, finite numbers. With it, also: the same
    plan, the same keys, tokenizer included, and every weight encoded anew to the same bytes.

    Exit code 1 when anything fails.
    """
    is_gguf = out.suffix.lower() == ".gguf" and not out.is_dir()
    if imatrix and not (is_gguf and source):
        raise UsageError("--imatrix is for GGUF files with --source", hint="leave it out")
    checks: list[tuple[str, bool, str]] = []
    for check in (
        gguf_checks(out, source, revision, imatrix, as_json)
        if is_gguf
        else folder_checks(out, source, revision, no_logits, as_json)
    ):
        checks.append(check)
        if not as_json:
            draw(*check)
    if as_json:
        click.echo(
            json.dumps(
                {"out": str(out), "checks": [dict(zip(("name", "ok", "detail"), c, strict=True)) for c in checks]}
            )
        )
    failed = [name for name, ok, _ in checks if not ok]
    if failed:
        raise VerifyError(f"{out}: {', '.join(failed)} failed", hint=advice("file" if is_gguf else "folder", failed))
    if not as_json:
        click.echo(f"{out}: all {len(checks)} checks passed" + ("" if source else " (add --source to compare weights)"))


def advice(kind: str, failed: list[str]) -> str:
    """Where the plan is another, what differs is likely to be the source that --source names."""
    if "plan" in failed:
        return f"give the source that this {kind} was made from; if it was, convert it again"
    return f"do not use this {kind}; convert again"


def folder_checks(
    out: Path, source: str | None, revision: str | None, no_logits: bool, quiet: bool
) -> Iterator[tuple[str, bool, str]]:
    from mlxquant.cli.progress import ByteBar
    from mlxquant.cli.resolve import resolve_source
    from mlxquant.convert.checks import check_folder, open_written
    from mlxquant.convert.sources import open_source

    path, origin = resolve_source(source, revision) if source else (None, None)
    opened = open_source(path, origin) if path else None
    total = sum(spec.nbytes for spec in open_written(out).folder.specs.values())
    passed = True
    with ByteBar("Verifying", quiet=quiet, transient=True) as bar:
        bar.start(total * (2 if opened else 1), 0)
        for check in check_folder(out, opened, bar.advance):
            passed = passed and check.ok
            with bar.aside():
                yield check.name, check.ok, check.detail
    if path and not no_logits and passed:
        yield logits(path, out)


def gguf_checks(
    out: Path, source: str | None, revision: str | None, imatrix: str | None, quiet: bool
) -> Iterator[tuple[str, bool, str]]:
    from mlxquant.cli.progress import ByteBar
    from mlxquant.cli.resolve import resolve_source
    from mlxquant.convert.gguf_checks import check_gguf, open_written_gguf
    from mlxquant.files.imatrix import read_imatrix

    path, origin = resolve_source(source, revision) if source else (None, None)
    entries = read_imatrix(imatrix) if imatrix else None
    with ByteBar("Verifying", quiet=quiet, transient=True) as bar:
        bar.start(open_written_gguf(out).nbytes * (2 if path else 1), 0)
        for check in check_gguf(out, path, origin, imatrix=entries, advance=bar.advance):
            with bar.aside():
                yield check.name, check.ok, check.detail


def draw(name: str, ok: bool, detail: str) -> None:
    click.secho("  ok   " if ok else "  FAIL ", fg="green" if ok else "red", nl=False)
    click.echo(f"{name:10} {detail}")


def logits(source: Path, out: Path) -> tuple[str, bool, str]:
    """The last check runs both models, so it comes when everything cheaper has passed.

    Where the source is too large to be run on this machine, it says so and is not counted as failed.
    """
    from mlxquant.convert.checks import open_written
    from mlxquant.errors import MemoryBudgetError
    from mlxquant.measure.agree import LIMIT_NATS, LIMIT_TIMES, agreement
    from mlxquant.run.device import prepare

    try:
        written = open_written(out)
        found = agreement(source, out, prepare(), written.stored, written.promise)
    except MemoryBudgetError as error:
        return "logits", True, f"skipped: {error.message}"
    drift = f"KL divergence {found.drift_nats:.1e} nats from the source rounded alike (limit {LIMIT_NATS})"
    if found.calibrated:
        drift = f"KL divergence of plain rounding {found.rounding_nats:.4f} nats (limit {LIMIT_TIMES} times that)"
    cost = f"{found.kl_nats:.4f} from the source itself over {found.tokens} tokens, same best token {found.top1:.0%}"
    coarse = "; too coarse for this model: use more bits" if found.top1 < COARSE_TOP1 else ""
    return "logits", found.ok, f"{drift}; {cost}{coarse}"
