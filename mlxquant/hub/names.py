"""What people and repositories call things: Hub ids, file names, and which files of a repo a model needs.

Pure: everything here follows from names. A name that a repo lists is hostile until `check_names` has seen it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from mlxquant.errors import HubError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Beside the weights. No *.py and no pickle: nothing that is pulled can run.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.tiktoken",
    "*.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "LICENSE",
    "LICENSE.md",
    "LICENSE.txt",
    "NOTICE",
)
CARD = "README.md"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")
_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"


@dataclass(frozen=True)
class HubId:
    """`org/name`, or one file of it: `org/name/file.gguf`."""

    repo_id: str
    file: str | None = None


def parse_id(text: str, file: str = r".+\.gguf") -> HubId | None:
    """None when `text` cannot be a Hub id. Whether it is a path comes first, and is the caller's question. `file`: the
    pattern of the one file that may be named.
    """
    match = re.fullmatch(rf"({_PART}/{_PART})(?:/({file}))?", text)
    if not match or "--" in match[1] or ".." in match[1] or not (match[2] is None or is_safe(match[2])):
        return None
    return HubId(match[1], match[2])


def is_safe(name: str) -> bool:
    """Whether a listed name stays inside the folder it is written to, on every system."""
    return bool(name) and name.isprintable() and not re.search(r"\\|:|//|(^|/)\.{0,2}(/|$)", name)


def check_names(repo_id: str, names: Iterable[str]) -> None:
    """Raises HubError for absolute names, `..`, backslashes, drive letters and control characters."""
    for name in names:
        if not is_safe(name):
            raise HubError(
                f"{repo_id} lists the file name {name!r}, which does not stay inside the model's folder",
                hint="do not use this repo; report it to the Hub",
            )


def companions(names: Iterable[str]) -> list[str]:
    """Those of COMPANIONS that the repo holds. A `*` does not reach into folders."""
    return sorted(n for n in names if any(n.count("/") == p.count("/") and fnmatchcase(n, p) for p in COMPANIONS))


def shards(repo_id: str, names: Iterable[str], index: Any) -> list[str]:
    """The weight files of a repo: model.safetensors, else what `index` names (the parsed index, or None).

    Without either: every other *.safetensors at the root, where `consolidated*`, a second copy of the same
    weights in Mistral's own layout, counts only when there is nothing else. [] when there are none.
    Raises HubError when the index names a file that is unsafe or that the repo does not hold.
    """
    root = sorted(n for n in names if "/" not in n and n.endswith(".safetensors"))
    if SINGLE in root:
        return [SINGLE]
    if index is not None:
        return _indexed(repo_id, set(names), index)
    main = [n for n in root if not n.startswith("consolidated")]
    return [n for n in main if n.startswith("model")] or main or root


def split_parts(repo_id: str, file: str, names: Iterable[str]) -> list[str]:
    """All files of a split GGUF model of which `file` is one, by llama.cpp's naming; else `file` alone.

    Raises HubError when a part is not in the repo.
    """
    match = re.fullmatch(r"(.+)-\d{5}-of-(\d{5})\.gguf", file)
    if match is None:
        return [file]
    count = int(match[2])
    here = [name for name in sorted(names) if re.fullmatch(rf"{re.escape(match[1])}-\d{{5}}-of-{match[2]}\.gguf", name)]
    if len(here) != count:
        raise HubError(
            f"{repo_id}/{file} is one of {count} parts, and the repo holds {len(here)}",
            hint="the upload is incomplete: try another revision or file",
        )
    return here


def _indexed(repo_id: str, names: set[str], index: Any) -> list[str]:
    weight_map = index.get("weight_map") if isinstance(index, Mapping) else None
    if not isinstance(weight_map, Mapping) or not all(isinstance(v, str) for v in weight_map.values()):
        message = f"{repo_id}/{INDEX} has no `weight_map` from tensor names to file names"
        raise HubError(message, hint="the upload is damaged: try another revision")
    wanted = sorted(set(weight_map.values()))
    check_names(repo_id, wanted)
    wrong = [n for n in wanted if n not in names or not n.endswith(".safetensors")]
    if wrong or not wanted:
        found = f"names {', '.join(wrong[:3])}, which the repo does not hold" if wrong else "names no files"
        raise HubError(f"{repo_id}/{INDEX} {found}", hint="the upload is incomplete: try another revision")
    return wanted


def no_weights(repo_id: str, names: Iterable[str]) -> HubError:
    """The error for a repo without safetensors: says what it has instead."""
    names = list(names)
    ggufs = [n for n in names if n.endswith(".gguf")]
    pickles = [n for n in names if n.endswith(PICKLES)]
    if ggufs:
        some = ", ".join(ggufs[:12]) + " ..." * (len(ggufs) > 12)
        hint = f"name one of them: {repo_id}/{ggufs[0]}"
        return HubError(f"{repo_id} has no safetensors, only GGUF files: {some}", hint=hint)
    if pickles:
        return HubError(
            f"{repo_id} has no safetensors, only pickled weights ({pickles[0]}), which run code when read",
            hint="look for a safetensors copy, or make one: huggingface.co/spaces/safetensors/convert",
        )
    return HubError(f"{repo_id} holds no model weights", hint="check the repo id")
