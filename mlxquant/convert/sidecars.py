"""The small files beside the weights: which are copied byte for byte, and what config.json says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mlxquant import __version__
from mlxquant.errors import SourceError
from mlxquant.families.eos import eos_ids, stock_eos
from mlxquant.families.mlx_config import mlx_config
from mlxquant.files.reading import InputFile
from mlxquant.hub.names import companions
from mlxquant.plan.plan import Plan
from mlxquant.tensors import DTYPES

NOT_WRITTEN = ("_name_or_path", "vision_config", "audio_config")
MAX_SIDECAR_BYTES = 200 * 2**20


class Described(Protocol):
    """What the small files are made from; every OpenSource is one."""

    config: dict[str, Any]
    origin: dict[str, Any]

    def sidecars(self) -> dict[str, bytes]: ...


def folder_sidecars(folder: Path) -> dict[str, bytes]:
    """The folder's tokenizer, template and licence files, name -> bytes. Raises SourceError for an oversized one."""
    return {name: read_small(folder / name) for name in sidecar_names(folder)}


def sidecar_names(folder: Path) -> list[str]:
    """What is copied: the files that are pulled beside weights, but for config.json, which is rewritten. Names that
    begin with a dot are macOS's resource forks on foreign disks."""
    found = [*folder.glob("*"), *folder.glob("additional_chat_templates/*")]
    names = companions(p.relative_to(folder).as_posix() for p in found if p.is_file() and not p.name.startswith("."))
    return [name for name in names if name != "config.json"]


def read_small(path: Path) -> bytes:
    """Raises SourceError for a file that is oversized or cannot be read."""
    file = InputFile(path)
    if file.nbytes > MAX_SIDECAR_BYTES:
        raise SourceError(f"{path}: {file.nbytes} bytes, expected a small file (at most {MAX_SIDECAR_BYTES})")
    return file.read(0, file.nbytes, "the text")


def parse(sidecars: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """A JSON sidecar as a dict, {} when it is not there. Raises SourceError when it is no JSON object."""
    if name not in sidecars:
        return {}
    try:
        value = json.loads(sidecars[name])
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{name}: not JSON ({error})", hint="download the file again") from error
    if not isinstance(value, dict):
        raise SourceError(f"{name}: holds a {type(value).__name__}, expected an object")
    return value


def chat_template(sidecars: Mapping[str, bytes]) -> str:
    """The template text, found where transformers looks first: the .jinja file, then chat_template.json, then the
    tokenizer's config. Several named templates are joined: for end-of-turn tokens each of them counts."""
    if "chat_template.jinja" in sidecars:
        return sidecars["chat_template.jinja"].decode("utf-8", "replace")
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = parse(sidecars, name).get("chat_template")
        if isinstance(template, str):
            return template
        if isinstance(template, list):
            return "\n".join(str(t.get("template", "")) for t in template if isinstance(t, dict))
    return ""


@dataclass(frozen=True)
class Ends:
    """ids: every id that ends an answer. stock: those at which stock mlx-lm stops when config.json lists them all."""

    ids: tuple[int, ...]
    stock: frozenset[int]

    @property
    def missed(self) -> list[int]:
        return sorted(set(self.ids) - self.stock)


def ends_of(config: dict[str, Any], files: Mapping[str, bytes], listed: bool = True) -> Ends:
    """The ends of an answer by config, generation config, tokenizer and template.

    `listed`: reckon as if config.json listed the union, as what we write does; else as it stands.
    """
    generation, tokenizer_config = (parse(files, n) for n in ("generation_config.json", "tokenizer_config.json"))
    tokenizer = parse(files, "tokenizer.json")
    ids = eos_ids(config, generation, tokenizer_config, tokenizer, chat_template(files))
    written = config | _eos(ids) if listed else config
    return Ends(ids, frozenset(stock_eos(written, generation, tokenizer_config, tokenizer)))


def written_sidecars(files: Mapping[str, bytes], ends: Ends) -> dict[str, bytes]:
    """The sidecars as they are written: byte for byte, with one exception.

    Stock mlx-lm lets generation_config.json's eos_token_id replace config.json's. Where that list is shorter than the
    union, answers would run on, so there (and only there) this one key is rewritten; verify allows nothing else.
    """
    written = dict(files)
    if ends.missed:
        written["generation_config.json"] = _json(parse(files, "generation_config.json") | _eos(ends.ids))
    return written


def small_files(source: Described, plan: Plan, changed: dict[str, Any] | None = None) -> dict[str, bytes]:
    """Everything beside the weights, index and manifest: the sidecars and config.json. changed: the source's config,
    where the model is no longer what it says.
    """
    files = source.sidecars()
    ends = ends_of(source.config, files)
    config = config_json(changed or source.config, ends, plan, source.origin)
    return written_sidecars(files, ends) | {"config.json": config}


def _eos(ids: tuple[int, ...]) -> dict[str, Any]:
    """One id as a number, several as a list: what every reader of config.json knows."""
    return {"eos_token_id": ids[0] if len(ids) == 1 else list(ids)} if ids else {}


def _json(value: dict[str, Any]) -> bytes:
    # In ASCII, as mlx-lm and transformers write it: half a surrogate pair, which JSON allows, has no UTF-8.
    return (json.dumps(value, indent=2) + "\n").encode()


def config_json(config: dict[str, Any], ends: Ends, plan: Plan, origin: dict[str, Any]) -> bytes:
    """The source's config with EOS union, quantization block, dtype and the `mlxquant` block that says how it was made;
    and what transformers 5 writes elsewhere, such as rope_theta, where stock mlx-lm looks for it.

    `vision_config` and its like go, as stock mlx-lm drops them: loaders take their presence for a vision model.
    """
    made = {k: v for k, v in mlx_config(config).items() if k not in NOT_WRITTEN}
    made |= _eos(ends.ids)
    made["torch_dtype"] = DTYPES[plan.dtype].label
    if any(t.codec.quantized for t in plan.tensors):
        made["quantization"] = made["quantization_config"] = plan.quantization_config()
    made["mlxquant"] = {
        "version": __version__,
        "recipe": plan.settings.recipe,
        "method": plan.settings.method,
        "bits": plan.base.bits,
        "group_size": plan.base.group_size,
        "mode": plan.base.mode,
        "sets": [f"{pattern}={codec.label}" for pattern, codec in plan.settings.sets],
        "bpw": round(plan.bpw, 4),
        "plan_sha256": plan.digest(),
        "source": origin,
    }
    return _json(made)
