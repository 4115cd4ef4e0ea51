"""`mlxquant verify OUT [--source SRC]`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from mlxquant.errors import VerifyError

# Below this share of same best tokens, what was written rightly is still hardly the same model.
COARSE_TOP1 = 0.5


@click.command()
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--source", metavar="SRC", help="What OUT was made from: a folder, a .gguf file or a Hub id.")
@click.option("--revision", help="Branch, tag or commit, when SRC is a Hub id.")
@click.option("--no-logits", is_flag=True, help="Skip the run of both models on a short prompt.")
@click.option("--json", "as_json", is_flag=True, help="Print the checks as one JSON object.")
def command(out: Path, source: str | None, revision: str | None, no_logits: bool, as_json: bool) -> None:
    """Prove that OUT is what its plan says, and that it still agrees with its source.

    Without --source: specs, config, checksums, head, EOS. With it, also: every weight within its format's bound, norms,
    tokenizer bytes, and the logits of both models on a short prompt. Exit code 1 when anything fails.
    """
    from mlxquant.cli.progress import ByteBar
    from mlxquant.cli.resolve import resolve_source
    from mlxquant.convert.checks import check_folder, open_written
    from mlxquant.convert.sources import open_source

    path, origin = resolve_source(source, revision) if source else (None, None)
    opened = open_source(path, origin) if path else None
    checks = []
    total = sum(spec.nbytes for spec in open_written(out).folder.specs.values())
    with ByteBar("Verifying", quiet=as_json) as bar:
        bar.start(total * (2 if opened else 1), 0)
        for check in check_folder(out, opened, bar.advance):
            checks.append((check.name, check.ok, check.detail))
            if not as_json:
                draw(check.name, check.ok, check.detail)
    if path and not no_logits and all(ok for _, ok, _ in checks):
        checks.append(logits(path, out))
        if not as_json:
            draw(*checks[-1])
    if as_json:
        click.echo(
            json.dumps(
                {"out": str(out), "checks": [dict(zip(("name", "ok", "detail"), c, strict=True)) for c in checks]}
            )
        )
    failed = [name for name, ok, _ in checks if not ok]
    if failed:
        raise VerifyError(f"{out}: {', '.join(failed)} failed", hint="do not use this folder; convert again")
    if not as_json:
        click.echo(f"{out}: all {len(checks)} checks passed" + ("" if source else " (add --source to compare weights)"))


def draw(name: str, ok: bool, detail: str) -> None:
    click.secho("  ok   " if ok else "  FAIL ", fg="green" if ok else "red", nl=False)
    click.echo(f"{name:10} {detail}")


def logits(source: Path, out: Path) -> tuple[str, bool, str]:
    """The last check runs both models, so it comes when everything cheaper has passed.

    Where the source is too large to be run on this machine, it says so and is not counted as failed.
    """
    from mlxquant.convert.checks import open_written
    from mlxquant.errors import MemoryBudgetError
    from mlxquant.measure.agree import LIMIT_NATS, agreement
    from mlxquant.run.device import prepare

    try:
        found = agreement(source, out, prepare(), open_written(out).stored)
    except MemoryBudgetError as error:
        return "logits", True, f"skipped: {error.message}"
    drift = f"KL divergence {found.drift_nats:.1e} nats from the source rounded alike (limit {LIMIT_NATS})"
    cost = f"{found.kl_nats:.4f} from the source itself over {found.tokens} tokens, same best token {found.top1:.0%}"
    coarse = "; too coarse for this model: use more bits" if found.top1 < COARSE_TOP1 else ""
    return "logits", found.ok, f"{drift}; {cost}{coarse}"
