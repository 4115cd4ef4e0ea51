"""Which files a repo holds at one commit: from the Hub, or from the cache when the Hub cannot be asked."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxquant.errors import HubError
from mlxquant.hub.failures import Unreachable, endpoint, told_as_hub_errors
from mlxquant.hub.names import INDEX, SINGLE, check_names, no_weights, shards

JSON_LIMIT_BYTES = 64 * 2**20  # the index of a 1000-shard model has a few MB


@dataclass(frozen=True)
class RemoteFile:
    """`etag` names the content: its sha256 where there is one (LFS files: all weights), else its git blob."""

    name: str
    nbytes: int
    etag: str
    sha256: str | None


@dataclass(frozen=True)
class Listing:
    """`revision` is the commit. `cached` is the snapshot's folder when the cache was asked, not the Hub. `repo_type`:
    "model" or "dataset", as the client has it.
    """

    repo_id: str
    revision: str
    files: dict[str, RemoteFile]
    cached: Path | None = None
    repo_type: str = "model"

    @property
    def page(self) -> str:
        """What comes behind the Hub's address."""
        return page(self.repo_id, self.repo_type)

    @property
    def folder(self) -> Path:
        """Where the cache holds, or would hold, this commit."""
        return cache_folder(self.repo_id, self.repo_type) / "snapshots" / self.revision

    def path(self, name: str) -> Path | None:
        """Where the cache holds this file of this commit, if it does."""
        path = self.folder / name
        return path if path.is_file() else None


def list_files(repo_id: str, revision: str | None = None, repo_type: str = "model") -> Listing:
    """Asks the Hub, or the cache in offline mode and when the Hub gives no answer.

    Raises HubError: no such repo or revision, gated, unreachable and not in the cache, a listing of lies.
    """
    try:
        return _ask(repo_id, revision, repo_type)
    except Unreachable as outage:
        if listing := _from_cache(repo_id, revision, repo_type):
            return listing
        at = f" at revision {revision}" if revision else ""
        message = f"{outage.message}, and {repo_id}{at} is not in the Hub cache"
        raise HubError(message, hint=outage.hint) from outage


def read_json(listing: Listing, name: str) -> Any:
    """One small JSON file of the repo, through the cache. Raises HubError naming it when it is not JSON."""
    from huggingface_hub import hf_hub_download

    where = f"{listing.repo_id}/{name}"
    if (nbytes := listing.files[name].nbytes) > JSON_LIMIT_BYTES:
        raise HubError(f"{where} has {nbytes:,} bytes, far too many for a file of its kind")
    with told_as_hub_errors(listing.repo_id), quiet_client():
        path = Path(hf_hub_download(listing.repo_id, name, revision=listing.revision))
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise HubError(f"{where} is not JSON: {str(error)[:80]}", hint="try another repo") from error


def weight_files(listing: Listing) -> list[str]:
    """The safetensors files to read. Raises HubError for a repo that is no model, or has an index of lies."""
    index = read_json(listing, INDEX) if INDEX in listing.files and SINGLE not in listing.files else None
    names = shards(listing.repo_id, listing.files, index)
    if not names:
        raise no_weights(listing.repo_id, listing.files)
    if "config.json" not in listing.files:
        raise HubError(f"{listing.repo_id} has no config.json", hint="give the repo of the base model")
    return names


@contextmanager
def quiet_client() -> Iterator[None]:
    """No progress bars from the client inside the block: what is shown is the command line's business."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def page(repo_id: str, repo_type: str) -> str:
    return repo_id if repo_type == "model" else f"{repo_type}s/{repo_id}"


def cache_folder(repo_id: str, repo_type: str = "model") -> Path:
    """The repo's folder in the Hub cache: blobs/ETAG, refs/NAME, snapshots/COMMIT/FILE, as documented."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser() / f"{repo_type}s--{repo_id.replace('/', '--')}"


def _ask(repo_id: str, revision: str | None, repo_type: str) -> Listing:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    with told_as_hub_errors(page(repo_id, repo_type), revision):
        try:
            api = HfApi()
            sha = api.repo_info(repo_id, revision=revision, repo_type=repo_type).sha
            tree = api.list_repo_tree(repo_id, revision=sha, recursive=True, repo_type=repo_type)
            rows = [
                _remote_file(f.path, f.size, f.blob_id, f.lfs.sha256 if f.lfs else None)
                for f in tree
                if isinstance(f, RepoFile)
            ]
        except (TypeError, KeyError, AttributeError, ValueError, RecursionError) as error:
            if isinstance(error, OSError):
                raise  # the client's own errors, some of which are also ValueErrors
            hint = "check HF_ENDPOINT, and that no proxy or log-in page of the network answers in its place"
            raise HubError(f"{endpoint()} did not answer as a Hub does for {repo_id}", hint=hint) from error
    if not sha or not re.fullmatch(r"[0-9a-f]{40}", sha):
        raise HubError(f"{endpoint()} gave {sha!r} as the commit of {repo_id}", hint="check HF_ENDPOINT")
    check_names(repo_id, [f.name for f in rows])
    return Listing(repo_id, sha, {f.name: f for f in rows}, repo_type=repo_type)


def _remote_file(name: str, nbytes: int, blob_id: str, sha256: str | None) -> RemoteFile:
    etag = sha256 or blob_id
    # It becomes a file name in the cache, and the number of bytes a sum that the disk is compared with.
    if not isinstance(nbytes, int) or nbytes < 0 or not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", etag):
        raise ValueError(f"{name}: {nbytes!r} bytes, {etag!r}")
    return RemoteFile(name, nbytes, etag, sha256)


def _from_cache(repo_id: str, revision: str | None, repo_type: str) -> Listing | None:
    """What an earlier pull left: the client's own record of the commit's files, and those that are there."""
    folder, name = cache_folder(repo_id, repo_type), revision or "main"
    ref = folder / "refs" / name
    sha = name if re.fullmatch(r"[0-9a-f]{40}", name) else ref.read_text().strip() if ref.is_file() else ""
    snapshot = folder / "snapshots" / sha
    if not sha or not snapshot.is_dir():
        return None
    files = [_cached_file(p, snapshot) for p in sorted(snapshot.rglob("*")) if p.is_file()]
    return Listing(repo_id, sha, _recorded(folder, sha) | {f.name: f for f in files}, snapshot, repo_type)


def _cached_file(path: Path, snapshot: Path) -> RemoteFile:
    """A snapshot's file is a link to a blob that has its etag for a name."""
    etag = path.resolve().name
    sha256 = etag if re.fullmatch(r"[0-9a-f]{64}", etag) else None
    return RemoteFile(path.relative_to(snapshot).as_posix(), path.stat().st_size, etag, sha256)


def _recorded(folder: Path, sha: str) -> dict[str, RemoteFile]:
    """trees/COMMIT.json of client 2.x, which tells a partial snapshot from a whole one. {} without it."""
    try:
        rows = json.loads((folder / "trees" / f"{sha}.json").read_bytes())["files"]
        return {n: _remote_file(n, r["size"], r["blob_id"], r.get("lfs_sha256")) for n, r in rows.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}
