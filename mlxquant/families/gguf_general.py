"""Whose model it is: general.* of a GGUF file, from the model card, generation_config.json and the folder's name.

Source: gguf.Metadata (gguf-py/gguf/metadata.py), whose heuristics are asked; what they are fed and what is taken from
them is somebody else's text, so here every value is looked at before it becomes a key.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

import numpy as np

Shape = tuple[int, ...]
Pairs = Iterator[tuple[str, Any]]

# generation_config.json -> general.sampling.*; the first that is set counts.
_SAMPLING: tuple[tuple[str, type, tuple[str, ...]], ...] = (
    ("sequence", str, ("sequence",)),
    ("top_k", np.int32, ("top_k",)),
    ("top_p", np.float32, ("top_p",)),
    ("min_p", np.float32, ("min_p",)),
    ("xtc_probability", np.float32, ("xtc_probability",)),
    ("xtc_threshold", np.float32, ("xtc_threshold",)),
    ("temp", np.float32, ("temperature",)),
    ("penalty_last_n", np.int32, ("penalty_last_n",)),
    ("penalty_repeat", np.float32, ("penalty_repeat", "repetition_penalty")),
    ("mirostat", np.int32, ("mirostat",)),
    ("mirostat_tau", np.float32, ("mirostat_tau",)),
    ("mirostat_eta", np.float32, ("mirostat_eta",)),
)
# Metadata's field -> key, in the order of set_gguf_meta_model, around size_label and license.
_BEFORE = ("name", "author", "version", "organization", "finetune", "basename", "description", "quantized_by")
_AFTER = {
    "license_name": "license.name", "license_link": "license.link", "url": "url", "doi": "doi", "uuid": "uuid",
    "repo_url": "repo_url", "source_url": "source.url", "source_doi": "source.doi", "source_uuid": "source.uuid",
    "source_repo_url": "source.repo_url",
}  # fmt: skip
_OF_ENTRY = ("name", "author", "version", "organization", "description", "url", "doi", "uuid", "repo_url")
# Front matter is a page, or a few dozen with all benchmarks; more, or deeper, is somebody's joke.
_MAX_CARD_CHARACTERS, _MAX_DEPTH = 1 << 18, 16


def general_keys(
    config: Mapping[str, Any], sidecars: Mapping[str, bytes], name: str, shapes: Mapping[str, Shape]
) -> dict[str, Any]:
    """general.sampling.* to general.languages, as convert_hf_to_gguf.py writes them.

    `sidecars`: README.md and generation_config.json count. A card whose front matter cannot be read says nothing, and
    a value of an unexpected type is left out: neither is worth a refusal. `name`: of the model's folder. `shapes`: GGUF
    name -> shape, outermost axis first, for general.size_label."""
    import gguf  # 0.2 s
    from gguf.metadata import Metadata

    logging.getLogger("metadata").setLevel(logging.CRITICAL)  # gguf's: it tells stderr what it makes nothing of
    total, *others = count_parameters(shapes)
    # Only the name of the path is looked at.
    path = PurePosixPath(name.replace("/", "-") or "model")
    hub = {key: value for key, value in config.items() if key == "_name_or_path" and isinstance(value, str)}
    found = Metadata.apply_metadata_heuristic(Metadata(), model_card(sidecars.get("README.md", b"")), hub, path, total)
    keys = dict(_sampling(_generation_config(sidecars)))
    keys["general.name"] = path.name
    keys |= {f"general.{key}": getattr(found, key) for key in _BEFORE if isinstance(getattr(found, key), str)}
    if total and not isinstance(found.size_label, str):
        found.size_label = gguf.size_label(total, *others)
    keys |= dict(_authorship(found))
    return keys


def _authorship(found: Any) -> Pairs:
    if isinstance(found.size_label, str):
        yield "general.size_label", found.size_label
    licenses = _strings(found.license if isinstance(found.license, list) else [found.license])
    if licenses:
        yield "general.license", ",".join(licenses)
    for field, key in _AFTER.items():
        if isinstance(value := getattr(found, field), str):
            yield f"general.{key}", value
    yield from _entries("base_model", found.base_models)
    yield from _entries("dataset", found.datasets)
    for key in ("tags", "languages"):
        if values := _strings(getattr(found, key)):
            yield f"general.{key}", values


def _entries(kind: str, entries: Any) -> Pairs:
    """The models it was made from, or the data: numbered."""
    if entries is None:
        return
    yield f"general.{kind}.count", np.uint32(len(entries))
    for i, entry in enumerate(entries):
        for key in _OF_ENTRY:
            if isinstance(entry, dict) and isinstance(entry.get(key), str):
                yield f"general.{kind}.{i}.{key}", entry[key]


def _strings(values: Any) -> list[str]:
    return [value for value in values or () if isinstance(value, str)]


def _sampling(generation: Mapping[str, Any]) -> Pairs:
    for key, kind, names in _SAMPLING:
        value = next((generation[name] for name in names if generation.get(name) is not None), None)
        if isinstance(value, str) if kind is str else _fits(value, kind):
            yield f"general.sampling.{key}", kind(value)


def _fits(value: Any, kind: type) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return False
    return abs(value) < 3.4e38 if kind is np.float32 else isinstance(value, int) and -(2**31) <= value < 2**31


def _generation_config(sidecars: Mapping[str, bytes]) -> dict[str, Any]:
    try:
        found = json.loads(sidecars.get("generation_config.json", b"{}"))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def model_card(readme: bytes) -> dict[str, Any]:
    """The front matter of a README.md, between two lines of `---`; empty where there is none that can be read."""
    import yaml

    lines = readme.decode("utf-8", "replace").splitlines()
    if not lines or lines[0] != "---":
        return {}
    end = lines.index("---", 1) if "---" in lines[1:] else len(lines)
    # As the script reads it: `no` is Norwegian, and a tab stands for two spaces.
    text = ("\n".join(lines[1:end]) + "\n").replace("- no\n", '- "no"\n').replace("\t", "  ")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    if len(text) > _MAX_CARD_CHARACTERS:
        return {}
    try:
        card = yaml.load(text, loader) if _is_harmless(yaml.parse(text, loader)) else {}
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):
        return {}
    return {key: value for key, value in card.items() if isinstance(key, str)} if isinstance(card, dict) else {}


def _is_harmless(events: Iterable[Any]) -> bool:
    """False where a line of YAML could take hours: aliases that multiply, nests that are searched at every level."""
    depth = 0
    for event in events:
        kind = type(event).__name__
        depth += kind.endswith("StartEvent") - kind.endswith("EndEvent")
        if kind == "AliasEvent" or depth > _MAX_DEPTH:
            return False
    return True


def count_parameters(shapes: Mapping[str, Shape]) -> tuple[int, int, int, int]:
    """(all, outside of experts, of one expert in each layer, experts): what gguf.size_label takes.

    Source: GGUFWriter.get_total_parameter_count."""
    total = shared = expert = count = stacks = 0
    for name, shape in shapes.items():
        size = math.prod(shape)
        total += size
        if "_exps." in name and len(shape) >= 3:
            experts = shape[-2 if ".bias" in name else -3]
            expert += size // max(experts, 1)
            count, stacks = count + experts, stacks + 1
        else:
            shared += size
    return total, shared, expert, count // stacks if stacks else 0
