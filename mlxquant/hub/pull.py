"""Pulls what a model needs from the Hub into the Hub cache, and nothing else.

Names, sizes and hashes are known before the first byte: a repo without usable weights, an index that names a
missing shard, a file name that climbs out of its folder and a disk that is too small are all said at once.
"""

from __future__ import annotations

import glob
import hashlib
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxquant.errors import HubError, UsageError
from mlxquant.hub.failures import MAKE_ROOM, told_as_hub_errors
from mlxquant.hub.listing import Listing, RemoteFile, cache_folder, list_files, quiet_client, weight_files
from mlxquant.hub.names import CARD, INDEX, SINGLE, HubId, companions, no_weights, parse_id, split_parts
from mlxquant.units import format_bytes

Progress = Callable[[int, int], None]  # bytes that are here, bytes of all wanted files; may come from any thread
_SPARE_BYTES = 64 * 2**20  # what a disk should keep beside the files themselves


@dataclass(frozen=True)
class Pulled:
    """`path` is the snapshot's folder, or the one GGUF file asked for; `revision` is the commit."""

    path: Path
    repo_id: str
    revision: str
    files: tuple[RemoteFile, ...]


def pull(repo_id: str, revision: str | None = None, *, progress: Progress | None = None) -> Pulled:
    """Downloads `org/name`, or `org/name/file.gguf`, unless the cache has it. Retries are the client's.

    What was newly downloaded is compared with the sha256 the Hub lists. In offline mode and when the Hub
    cannot be reached, a complete copy in the cache is taken. Raises UsageError for something that is no Hub
    id, HubError for all that the Hub, the network or the disk can do.
    """
    hub_id = parse_id(repo_id)
    if hub_id is None:
        raise UsageError(f"{repo_id!r} is no Hub id", hint="write it like org/name or org/name/file.gguf")
    listing = list_files(hub_id.repo_id, revision)
    wanted = [listing.files[n] for n in _choose(hub_id, listing)]
    folder = fetch(listing, revision, wanted, progress)
    path = folder / hub_id.file if hub_id.file else folder
    return Pulled(path, hub_id.repo_id, listing.revision, tuple(wanted))


def fetch(listing: Listing, revision: str | None, wanted: list[RemoteFile], progress: Progress | None = None) -> Path:
    """The folder of the cache that holds `wanted`, those that were missing downloaded and checked. `revision`: as it
    was asked for, a branch or a commit. Raises HubError as `pull` does.
    """
    missing = [f for f in wanted if listing.path(f.name) is None]
    if missing and listing.cached:
        names = ", ".join(f.name for f in missing[:3])
        message = f"{listing.repo_id} is not complete in the Hub cache ({names}), and the Hub cannot be asked"
        raise HubError(message, hint="run the same command once with a network connection")
    if missing:
        _check_space(listing, missing)
        _download(listing, revision, wanted, missing, progress)
    return listing.folder


def _choose(hub_id: HubId, listing: Listing) -> list[str]:
    """The names of the files to have, small ones first."""
    if hub_id.file is None:
        weights = weight_files(listing)
        index = [INDEX] if INDEX in listing.files and weights != [SINGLE] else []
        card = [CARD] if CARD in listing.files else []  # its licence and languages go into GGUF files
        return companions(listing.files) + card + index + weights
    if hub_id.file not in listing.files:
        raise no_weights(hub_id.repo_id, listing.files)
    return split_parts(hub_id.repo_id, hub_id.file, listing.files)


def _check_space(listing: Listing, missing: Iterable[RemoteFile]) -> None:
    """Raises HubError when what is to come does not fit beside what is there."""
    blobs = cache_folder(listing.repo_id, listing.repo_type) / "blobs"
    needed = sum(f.nbytes for f in missing if not (blobs / f.etag).exists())
    parent = next(p for p in (blobs, *blobs.parents) if p.is_dir())
    free = shutil.disk_usage(parent).free
    if needed + _SPARE_BYTES > free:
        room = f"the disk of the Hub cache has {format_bytes(free)} free"
        raise HubError(f"{listing.repo_id} needs {format_bytes(needed)} more, and {room}", hint=MAKE_ROOM)


def _download(
    listing: Listing,
    revision: str | None,
    wanted: list[RemoteFile],
    missing: list[RemoteFile],
    progress: Progress | None,
) -> None:
    from huggingface_hub import snapshot_download

    total, to_come = sum(f.nbytes for f in wanted), sum(f.nbytes for f in missing)
    report = progress or (lambda done, total: None)
    with told_as_hub_errors(listing.page, revision), quiet_client():
        folder = snapshot_download(
            listing.repo_id,
            repo_type=listing.repo_type,
            revision=revision,  # not the commit: the client then keeps the branch's name, for offline mode
            allow_patterns=[glob.escape(f.name) for f in wanted],
            tqdm_class=_byte_counter(lambda here: report(min(total - to_come + here, total), total)),
        )
    if Path(folder).name != listing.revision:
        raise HubError(f"{listing.repo_id} changed while it was pulled", hint="run the same command again")
    for file in missing:
        _check_content(listing, file)
    report(total, total)


def _check_content(listing: Listing, file: RemoteFile) -> None:
    """The client compares sizes only. A file that lies leaves the cache: the next pull is a new one."""
    path = listing.path(file.name)
    if path is None:
        raise HubError(f"{listing.repo_id}/{file.name} was not delivered", hint="run the same command again")
    size = path.stat().st_size
    if size == file.nbytes and (file.sha256 is None or _sha256(path) == file.sha256):
        return
    blob = path.resolve()
    path.unlink()
    blob.unlink(missing_ok=True)
    wrong = f"has {size:,} bytes, not {file.nbytes:,}" if size != file.nbytes else "has not the sha256 listed"
    raise HubError(f"{listing.repo_id}/{file.name} as delivered {wrong}", hint="run the same command again")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _byte_counter(tell: Callable[[int], None]) -> Any:
    """A progress bar for the client that draws nothing and tells how many bytes have come.

    Client 2.x keeps two bars of bytes, received and written, and one of files; the further of the two counts.
    """
    from tqdm.auto import tqdm

    most = 0

    class ByteCounter(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.counts_bytes = kwargs.get("unit") == "B"
            super().__init__(*args, **(kwargs | {"disable": True}))

        def update(self, n: float | None = 1) -> bool | None:
            nonlocal most
            self.n += n or 0
            if self.counts_bytes and self.n > most:
                most = int(self.n)
                tell(most)
            return None

    return ByteCounter
