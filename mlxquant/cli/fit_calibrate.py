"""`mlxquant fit MODEL --calibrate`: times a model here, and keeps what `fit` reckons with from then on."""

from __future__ import annotations

import datetime
import json
from typing import TYPE_CHECKING, Any

import click

from mlxquant.cli.fit_subject import subject_of
from mlxquant.cli.progress import waiting
from mlxquant.cli.running import open_ready, open_text
from mlxquant.units import format_rate

if TYPE_CHECKING:
    from mlxquant.fit.calibration import Trial
    from mlxquant.fit.subject import Subject
    from mlxquant.machine import Machine
    from mlxquant.measure.speed import Row

PROMPT_TOKENS, GENERATED_TOKENS, DEPTHS_TOKENS, REPEATS = 512, 64, (0, 2048), 3
_ENGINE = {"max_kv_size": None, "kv_bits": None, "kv_group_size": "64", "device": "auto", "expand": "auto"}


def calibrate(model: str, options: dict[str, Any]) -> None:
    """Runs `bench` on MODEL; Ctrl-C keeps nothing."""
    from mlxquant.fit.calibration import check, keep, load

    subject = subject_of(model, options)
    settings = {**_ENGINE, "prefill_step": None, "wired": False, "force": False, "revision": options["revision"]}
    path, where, text = open_text(model, settings)
    check(where.machine)
    rows = _timed(open_ready(path, where, text, settings, _longest()))
    trials = [_trial(subject, where.machine, row) for row in rows]
    kept = keep(where.machine, trials)
    own = load(where.machine)
    assert own is not None
    if options["as_json"]:
        click.echo(json.dumps({"file": str(kept), "models": own.models, "rows": [row.to_json() for row in rows]}))
        return
    for row in rows:
        depth, decode, prefill = row.case.depth_tokens, row.mean("decode_tok_s"), row.mean("prefill_tok_s")
        click.echo(f"{path.name} at {depth:,} tokens: decode {format_rate(decode)}, prefill {format_rate(prefill)}")
    click.echo(f"Kept in {kept}; `mlxquant fit` reckons with it on this machine.")
    if own.models == 1:
        click.echo("Next: calibrate a model of another size too, which tells bytes from layers.")


def _longest() -> int:
    return DEPTHS_TOKENS[-1] + PROMPT_TOKENS + GENERATED_TOKENS


def _timed(ready: Any) -> list[Row]:
    from mlxquant.measure.speed import bench, cases

    loaded = ready.loaded
    wanted = cases([PROMPT_TOKENS], [GENERATED_TOKENS], DEPTHS_TOKENS)
    with waiting("Timing prefill and decode"):
        return list(bench(loaded.model, ready.plan.make, loaded.vocabulary, wanted, REPEATS, ready.prefill_step))


def _trial(subject: Subject, machine: Machine, row: Row) -> Trial:
    from mlxquant.fit.memory import cache_on
    from mlxquant.fit.speed import trial_of
    from mlxquant.fit.stored import stored_level
    from mlxquant.fit.work import work

    level = stored_level(subject)
    return trial_of(
        level,
        work(subject),
        cache_on(machine, subject.shape),
        machine,
        model=f"{subject.name} {level.key}",
        depth_tokens=row.case.depth_tokens + row.case.prompt_tokens + row.case.generated_tokens // 2,
        prompt_tokens=row.case.prompt_tokens,
        decode_tok_s=row.mean("decode_tok_s"),
        prefill_tok_s=row.mean("prefill_tok_s"),
        bandwidth_bytes_per_s=_bandwidth(machine),
        date=datetime.date.today().isoformat(),
        versions=_versions(),
    )


def _bandwidth(machine: Machine) -> float:
    from mlxquant.measure.traffic import bandwidth_bytes_per_s

    return bandwidth_bytes_per_s(machine)[0]


def _versions() -> str:
    from importlib.metadata import version

    from mlxquant import __version__

    return f"{__version__}, mlx {version('mlx')}"
