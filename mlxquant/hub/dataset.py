"""One file of text out of a dataset on the Hub, through the same door, cache and checks as models come.

Only that file is fetched. Which one, where the id names none: what a validation or test split is called, else the only
one there is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mlxquant.errors import HubError, UsageError
from mlxquant.hub.listing import list_files
from mlxquant.hub.names import HubId, parse_id
from mlxquant.hub.pull import fetch
from mlxquant.units import format_bytes

DATA = (".txt", ".raw", ".jsonl", ".json", ".parquet")
# Beside the data in many datasets, and none of it.
_BESIDE = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json", "requirements.txt")
_SPLITS = (r"validation|valid|val|dev", r"test|eval")
_SHOWN = 12


@dataclass(frozen=True)
class DatasetFile:
    """revision: the commit. name: the file's path in the repo."""

    path: Path
    repo_id: str
    revision: str
    name: str


def is_dataset_id(text: str) -> bool:
    """Whether `text` is written as `org/name` or `org/name/path/of/a/file`."""
    return _parse(text) is not None


def dataset_file(spec: str, revision: str | None, limit_bytes: int) -> DatasetFile:
    """Downloads the file that `spec` names, `org/name` or `org/name/path`, unless the cache has it.

    Raises UsageError for something that is no id, HubError: no such file, none or several that it could be, larger than
    `limit_bytes`, and all that the Hub, the network or the disk can do (messages name the repo datasets/org/name).
    """
    hub_id = _parse(spec)
    if hub_id is None:
        raise UsageError(f"{spec!r} is no dataset on the Hub", hint="write it like org/name or org/name/file.txt")
    listing = list_files(hub_id.repo_id, revision, "dataset")
    file = listing.files[_choose(hub_id, listing.files)]
    if file.nbytes > limit_bytes:
        found, limit = format_bytes(file.nbytes), format_bytes(limit_bytes)
        raise HubError(
            f"{hub_id.repo_id}/{file.name} has {found}, expected at most {limit} of text",
            hint="name a smaller file of it, such as its test split",
        )
    folder = fetch(listing, revision, [file])
    return DatasetFile(folder / file.name, hub_id.repo_id, listing.revision, file.name)


def _parse(text: str) -> HubId | None:
    return parse_id(text, ".+")


def _choose(hub_id: HubId, names: Iterable[str]) -> str:
    names = sorted(names)
    data = [name for name in names if name.endswith(DATA) and PurePosixPath(name).name not in _BESIDE]
    if hub_id.file:
        if hub_id.file in names:
            return hub_id.file
        raise HubError(f"{hub_id.repo_id} has no file {hub_id.file}", hint=_list(hub_id.repo_id, data))
    for split in _SPLITS:
        if found := [name for name in data if re.search(rf"(?<![a-z])({split})(?![a-z])", name.lower())]:
            break
    else:
        found = data
    if len(found) == 1:
        return found[0]
    many = f"{len(found)} files that could be meant" if found else f"no files of text ({', '.join(DATA)})"
    raise HubError(f"{hub_id.repo_id} has {many}", hint=_list(hub_id.repo_id, found))


def _list(repo_id: str, names: list[str]) -> str:
    if not names:
        return "try another dataset"
    some = ", ".join(names[:_SHOWN]) + " ..." * (len(names) > _SHOWN)
    return f"name one of them like {repo_id}/{names[0]}: {some}" if len(names) > 1 else f"name {repo_id}/{names[0]}"
