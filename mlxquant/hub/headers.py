"""What a Hub model is, from its config and the first bytes of its weight files: kilobytes, not gigabytes.

A safetensors file begins with 8 bytes of length (little-endian) and that many bytes of JSON:
{name: {"dtype", "shape", "data_offsets": [begin, end]}}; the data follow without holes
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from mlxquant.errors import HubError, SourceError, UnsupportedError, UsageError
from mlxquant.hub.failures import told_as_hub_errors, transport_error
from mlxquant.hub.listing import Listing, RemoteFile, list_files, read_json, weight_files
from mlxquant.hub.names import parse_id
from mlxquant.tensors import DTYPES, TensorSpec

HEADER_LIMIT_BYTES = 100_000_000  # safetensors' own limit
# One request gets the header of most files; 97 % are under 100 kB (measured for the client's own reader).
_FIRST_BYTES = 100_000


@dataclass(frozen=True)
class Remote:
    """What a downloaded folder would show, without its rows. `files` are the weight files."""

    repo_id: str
    revision: str
    config: dict[str, Any]
    specs: dict[str, TensorSpec]
    files: tuple[RemoteFile, ...]


def remote_specs(repo_id: str, revision: str | None = None) -> Remote:
    """Config and tensor specs of `org/name` by range requests; files that the cache has are read there.

    Raises UsageError for something that is no Hub id, HubError as `pull` does, SourceError for a config or
    header of lies, naming the file.
    """
    hub_id = parse_id(repo_id)
    if hub_id is None or hub_id.file:
        raise UsageError(f"{repo_id!r} is no Hub id of a model", hint="write it like org/name")
    listing = list_files(repo_id, revision)
    files = [listing.files[n] for n in weight_files(listing)]
    config = read_json(listing, "config.json")
    if not isinstance(config, dict):
        raise SourceError(f"{repo_id}/config.json holds no JSON object")
    with ThreadPoolExecutor(max_workers=8) as pool:
        found = list(pool.map(lambda file: _specs(listing, file), files))
    return Remote(repo_id, listing.revision, config, _merge(repo_id, files, found), tuple(files))


def _merge(repo_id: str, files: list[RemoteFile], found: Iterable[dict[str, TensorSpec]]) -> dict[str, TensorSpec]:
    merged: dict[str, TensorSpec] = {}
    for file, specs in zip(files, found, strict=True):
        if twice := merged.keys() & specs.keys():
            raise SourceError(f"{repo_id}/{file.name} holds {min(twice)} a second time")
        merged |= specs
    return merged


def _specs(listing: Listing, file: RemoteFile) -> dict[str, TensorSpec]:
    where = f"{listing.repo_id}/{file.name}"
    start = read_range(listing, file, 0, min(_FIRST_BYTES, file.nbytes))
    length = int.from_bytes(start[:8], "little")
    if len(start) < 8 or length > min(HEADER_LIMIT_BYTES, file.nbytes - 8):
        raise SourceError(
            f"{where} announces a header of {length:,} bytes in a file of {file.nbytes:,}",
            hint="the file is damaged or no safetensors file: try another revision or repo",
        )
    head = start[8 : 8 + length]
    if len(head) < length:
        head += read_range(listing, file, len(start), 8 + length)
    return parse_header(head, file.nbytes - 8 - length, where)


def parse_header(head: bytes, data_bytes: int, where: str) -> dict[str, TensorSpec]:
    """The specs in a header with `data_bytes` of data behind it. Raises SourceError, UnsupportedError.

    Enough for a plan; whoever reads rows checks the offsets one by one.
    """
    try:
        rows = json.loads(head)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{where} has a header that is not JSON: {str(error)[:80]}") from error
    if not isinstance(rows, dict):
        raise SourceError(f"{where} has a header that is no JSON object")
    rows.pop("__metadata__", None)
    specs = {name: _spec(name, row, where) for name, row in rows.items()}
    total = sum(s.nbytes for s in specs.values())
    if total != data_bytes:
        raise SourceError(
            f"{where} names tensors of {total:,} bytes and holds {data_bytes:,}",
            hint="the upload is incomplete or damaged: try another revision or repo",
        )
    return specs


def _spec(name: str, row: Any, where: str) -> TensorSpec:
    shape = row.get("shape") if isinstance(row, dict) else None
    if not isinstance(shape, list) or len(shape) > 16 or any(not _is_count(n) for n in shape):
        raise SourceError(f"{where}: {name} has no shape that a tensor can have ({str(shape)[:60]})")
    code = row.get("dtype")
    if not isinstance(code, str) or code not in DTYPES:
        raise UnsupportedError(f"{where}: {name} has the dtype {code!r}, which mlxquant does not know")
    span = row.get("data_offsets")
    nbytes = math.prod(shape) * DTYPES[code].itemsize
    if not isinstance(span, list) or len(span) != 2 or any(not _is_count(n) for n in span):
        raise SourceError(f"{where}: {name} has no data offsets ({str(span)[:60]})")
    if span[1] - span[0] != nbytes:
        found = f"{where}: {name} spans bytes {span[0]}..{span[1]}"
        raise SourceError(f"{found}, but {code} {shape} takes {nbytes:,}")
    return TensorSpec(name, tuple(shape), code)


def _is_count(value: Any) -> bool:
    """A whole number that a file could hold: True and 1e30 are none."""
    return type(value) is int and 0 <= value < 2**60


def read_range(listing: Listing, file: RemoteFile, start: int, stop: int) -> bytes:
    """Bytes start..stop of the cached file, else by a range request. Raises HubError when fewer come."""
    if path := listing.path(file.name):
        with path.open("rb") as cached:
            cached.seek(start)
            data = cached.read(stop - start)
    else:
        data = _request(listing, file, start, stop)
    if len(data) != stop - start:
        message = f"{listing.repo_id}/{file.name} gave {len(data):,} bytes, not the {stop - start:,} asked for"
        raise HubError(message, hint="run the same command again")
    return data


def _request(listing: Listing, file: RemoteFile, start: int, stop: int) -> bytes:
    """Streams, and hangs up when it has enough: a server that ignores ranges must not fill our memory."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    url = hf_hub_url(listing.repo_id, file.name, revision=listing.revision)
    headers = build_hf_headers() | {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    data = bytearray()
    how: Any = {"headers": headers, "follow_redirects": True, "timeout": 30, "max_retries": 3}
    with told_as_hub_errors(listing.repo_id), http_stream_backoff("GET", url, **how) as answer:
        hf_raise_for_status(answer)
        skip = 0 if answer.status_code == 206 else start
        # Caught here: the client would go on from the middle of its own `with`. The caller counts what came.
        with suppress(transport_error()):
            for chunk in answer.iter_bytes():
                data += chunk
                if len(data) >= skip + stop - start:
                    break
    return bytes(data[skip : skip + stop - start])
