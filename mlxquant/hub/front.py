"""The front of one big file on the Hub, for readers that want a path: a GGUF header makes a plan."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from mlxquant.errors import SourceError, UnsupportedError, UsageError
from mlxquant.hub.headers import read_range
from mlxquant.hub.listing import Listing, RemoteFile, list_files
from mlxquant.hub.names import no_weights, parse_id

T = TypeVar("T")

FRONT_LIMIT_BYTES = 100_000_000
_FIRST_BYTES = 2**20  # small vocabularies fit; each further request quadruples what is here


def read_front(
    repo_file: str, revision: str | None, read: Callable[[Path], T], needs: Callable[[T], int]
) -> tuple[T, Listing, RemoteFile]:
    """What `read` makes of `org/name/file.gguf`, without downloading the file.

    `read` gets a path to a file of the true length that has zeros where nothing has come yet (sparse: they
    take no room on disk), and is called again with more while it raises SourceError or `needs` more bytes of
    the front than there are. A copy in the cache is read as it is.

    Raises UsageError, HubError as `pull` does, and what `read` raises, with the file's name on the Hub.
    """
    hub_id = parse_id(repo_file)
    if hub_id is None or hub_id.file is None:
        raise UsageError(f"{repo_file!r} names no file on the Hub", hint="write it like org/name/file.gguf")
    listing = list_files(hub_id.repo_id, revision)
    if hub_id.file not in listing.files:
        raise no_weights(hub_id.repo_id, listing.files)
    file = listing.files[hub_id.file]
    if cached := listing.path(file.name):
        return read(cached), listing, file
    with tempfile.TemporaryDirectory(prefix="mlxquant-") as folder:
        path = Path(folder) / Path(file.name).name
        try:
            return _grow(listing, file, path, read, needs), listing, file
        except SourceError as error:
            message = error.message.replace(str(path), f"{listing.repo_id}/{file.name}")
            raise type(error)(message, hint=error.hint) from error


def _grow(listing: Listing, file: RemoteFile, path: Path, read: Callable[[Path], T], needs: Callable[[T], int]) -> T:
    here, limit = 0, min(file.nbytes, FRONT_LIMIT_BYTES)
    while True:
        stop = min(max(_FIRST_BYTES, 4 * here), limit)
        with path.open("r+b" if here else "wb") as front:
            front.seek(here)
            front.write(read_range(listing, file, here, stop))
            front.truncate(file.nbytes)
        here = stop
        try:
            found = read(path)
        except UnsupportedError:
            raise
        except SourceError:
            if here == limit:
                raise
            continue
        if here == limit or needs(found) <= here:
            return found
