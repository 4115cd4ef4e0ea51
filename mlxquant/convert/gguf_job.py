"""All that a GGUF file is made of, from what `SRC` names: where rows come from, the plan, and every key."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxquant import __version__
from mlxquant.convert.block_rows import BlockRows, CheckpointRows, GGUFRows
from mlxquant.convert.gather import refuse_shifted_norms
from mlxquant.convert.sidecars import ends_of, read_small
from mlxquant.convert.sources import OpenSource, is_gguf, open_source
from mlxquant.errors import UsageError
from mlxquant.families.gguf_keys import file_keys, quantized_keys
from mlxquant.files.imatrix import Imatrix
from mlxquant.plan.gguf_plan import OWN_KEYS, GGUFPlan, plan_checkpoint, plan_gguf
from mlxquant.plan.gguf_types import TypeSettings

VERSION, SOURCE, SETTINGS, PLAN, TENSORS = (
    OWN_KEYS + name for name in ("version", "source", "settings", "plan_sha256", "tensors_sha256")
)
CARD = "README.md"


@dataclass(frozen=True)
class GGUFJob:
    """`metadata`: all keys but `TENSORS`, which the writer adds. `ends`: every token id that ends an answer."""

    rows: BlockRows
    plan: GGUFPlan
    metadata: Mapping[str, Any]
    ends: tuple[int, ...] = ()


def open_job(
    path: Path,
    origin: dict[str, Any] | None,
    settings: TypeSettings,
    *,
    imatrix: Imatrix | None = None,
    pre: str | None = None,
    allow_requantize: bool = False,
) -> GGUFJob:
    """Reads headers and small files. Raises SourceError, UnsupportedError, PlanError and UsageError."""
    if not is_gguf(path):
        return _from_checkpoint(open_source(path, origin), settings, imatrix, pre, allow_requantize)
    if pre is not None:
        raise UsageError(f"--pre {pre}: a GGUF source keeps its tokenizer as it is", hint="leave it out")
    rows = GGUFRows(path, origin)
    plan = plan_gguf(rows.file.typed, rows.file.tensors, settings, imatrix=imatrix, allow_requantize=allow_requantize)
    return GGUFJob(rows, plan, own_keys(plan.metadata, plan, rows.origin))


def _from_checkpoint(
    source: OpenSource, settings: TypeSettings, imatrix: Imatrix | None, pre: str | None, allow_requantize: bool
) -> GGUFJob:
    from mlxquant.families.gguf_vocab import vocabulary_keys

    sidecars = source.sidecars()
    vocabulary = vocabulary_keys(source.config, sidecars, pre)
    plan = plan_checkpoint(
        source.config,
        source.specs,
        settings,
        imatrix=imatrix,
        tokens=len(vocabulary["tokenizer.ggml.tokens"]),
        rounded=source.quantized,
        allow_requantize=allow_requantize,
    )
    refuse_shifted_norms(source, (t.target for t in plan.tensors))
    keys = checkpoint_keys(source, plan, sidecars) | vocabulary
    metadata = own_keys(quantized_keys(keys, settings.file_type_id), plan, source.origin, pre)
    return GGUFJob(CheckpointRows(source), plan, metadata, ends_of(source.config, sidecars).ids)


def checkpoint_keys(source: OpenSource, plan: GGUFPlan, sidecars: Mapping[str, bytes]) -> dict[str, Any]:
    """general.* and the architecture's keys, as convert_hf_to_gguf.py writes them."""
    name = Path(str(source.origin.get("name") or source.path.resolve().name)).name
    shapes = {t.name: t.target.shape for t in plan.tensors}
    return file_keys(source.config, {**sidecars, **_card(source.path)}, name, shapes, plan.settings.file_type_id)


def _card(folder: Path) -> dict[str, bytes]:
    """The model card, which is not copied with the model: licence, languages and base model stand there."""
    path = folder / CARD
    return {CARD: read_small(path)} if path.is_file() else {}


def own_keys(
    keys: Mapping[str, Any], plan: GGUFPlan, origin: Mapping[str, Any], pre: str | None = None
) -> dict[str, Any]:
    """`keys`, what llama-quantize notes of an importance matrix, and what `verify` needs.

    Of the importance matrix's path, the name alone: people publish these files.
    """
    made = {key: value for key, value in keys.items() if not key.startswith(OWN_KEYS)}
    if plan.imatrix:
        made |= plan.imatrix.metadata() | {"quantize.imatrix.file": Path(plan.imatrix.file).name}
    made |= {
        VERSION: __version__,
        SOURCE: json.dumps(origin, sort_keys=True),
        SETTINGS: json.dumps(plan.settings_json() | {"pre": pre}, sort_keys=True),
        PLAN: plan.digest(),
    }
    return made
