"""GGUF files before any data: every header byte, each tensor's place, and which part of a split it goes to.

The container's bytes are those of the `gguf` package's own writer. Parts are named and cut as it cuts them
(convert_hf_to_gguf.py --split-max-size): tensors in order until the next one would pass the limit, split.* in each
part, all other keys in the first.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUF_DEFAULT_ALIGNMENT as ALIGNMENT
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter

from mlxquant.errors import PlanError
from mlxquant.files.gguf_file import PARTS_LIMIT, STRING_LIMIT_BYTES
from mlxquant.files.gguf_spec import SPLIT_KEYS, GGUFSpec
from mlxquant.files.reading import shown
from mlxquant.files.shards import Shard

ARCHITECTURE = "general.architecture"
# The value of the key `sealed`, until the sha256 it is to hold is known.
UNSEALED = "0" * 64
NAME_LIMIT_BYTES = 63  # GGML_MAX_NAME, with a zero at its end

_KINDS = {
    np.dtype(np.uint8): GGUFValueType.UINT8,
    np.dtype(np.int8): GGUFValueType.INT8,
    np.dtype(np.uint16): GGUFValueType.UINT16,
    np.dtype(np.int16): GGUFValueType.INT16,
    np.dtype(np.uint32): GGUFValueType.UINT32,
    np.dtype(np.int32): GGUFValueType.INT32,
    np.dtype(np.float32): GGUFValueType.FLOAT32,
    np.dtype(np.uint64): GGUFValueType.UINT64,
    np.dtype(np.int64): GGUFValueType.INT64,
    np.dtype(np.float64): GGUFValueType.FLOAT64,
    np.dtype(np.bool_): GGUFValueType.BOOL,
}


def lay_out(
    name: str,
    metadata: Mapping[str, Any],
    tensors: Sequence[GGUFSpec],
    limit_bytes: int = 0,
    sealed: str | None = None,
) -> tuple[Shard, ...]:
    """The parts of the file `name` (name.gguf): one, unless the tensors have more than `limit_bytes` (0: no limit).

    `metadata`: values that carry their GGUF type (docs/architecture.md). `sealed`: the key of a sha256 that is known
    only at the end; its text becomes the `seal` of the first part. Raises PlanError for a name or value that no GGUF
    reader takes.
    """
    for spec in tensors:
        _check_name(spec.name)
    if limit_bytes and sum(spec.nbytes for spec in tensors) <= limit_bytes:
        limit_bytes = 0
    keys = {key: value for key, value in metadata.items() if key not in (*SPLIT_KEYS, "general.alignment")}
    if sealed is not None:
        keys[sealed] = UNSEALED
    with tempfile.TemporaryDirectory(prefix="mlxquant-") as scratch:
        writer = GGUFWriter(Path(scratch) / name, keys[ARCHITECTURE], split_max_size=limit_bytes)
        headers, parts = _written(writer, keys, tensors)
    specs = {spec.name: spec for spec in tensors}
    names = [path.name for path in writer.format_shard_names(Path(name))]
    shards = [
        _shard(file, header, [specs[tensor] for tensor in part])
        for file, header, part in zip(names, headers, parts, strict=True)
    ]
    if sealed is not None:
        shards[0] = replace(shards[0], seal=_seal(shards[0].header, sealed))
    return tuple(shards)


def _written(
    writer: GGUFWriter, keys: Mapping[str, Any], tensors: Sequence[GGUFSpec]
) -> tuple[list[bytes], list[list[str]]]:
    """(headers, names of tensors) of each part."""
    for key, value in keys.items():
        if key != ARCHITECTURE:  # the writer begins with it
            kind, inner = value_type(key, value)
            _check_texts(key, value)
            writer.add_key_value(key, value.tolist() if isinstance(value, np.ndarray) else value, kind, inner)
    for spec in tensors:
        kind = GGMLQuantizationType[spec.type_name]
        writer.add_tensor_info(spec.name, spec.shape, np.dtype(np.float32), spec.nbytes, kind)
    parts = [list(part) for part in writer.tensors]
    if len(parts) > PARTS_LIMIT:
        raise PlanError(f"{len(parts)} parts, expected at most {PARTS_LIMIT}", hint="use a larger --split-max-size")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    paths = writer.format_shard_names(writer.path)
    writer.close()
    return [path.read_bytes() for path in paths], parts


def value_type(key: str, value: Any) -> tuple[GGUFValueType, GGUFValueType | None]:
    """(type, type of an array's elements) of one value of metadata. Raises PlanError for what GGUF cannot hold."""
    if isinstance(value, str):
        return GGUFValueType.STRING, None
    if isinstance(value, bool):
        return GGUFValueType.BOOL, None
    if isinstance(value, np.generic) and value.dtype in _KINDS:
        return _KINDS[value.dtype], None
    if isinstance(value, np.ndarray) and value.ndim == 1 and value.size and value.dtype in _KINDS:
        return GGUFValueType.ARRAY, _KINDS[value.dtype]
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return GGUFValueType.ARRAY, GGUFValueType.STRING
    if isinstance(value, list) and value and all(isinstance(item, bool) for item in value):
        return GGUFValueType.ARRAY, GGUFValueType.BOOL
    raise PlanError(f"key {shown(key)}: GGUF has no type for {shown(repr(value))}")


def _check_texts(key: str, value: Any) -> None:
    """Nothing is written that GGUFFile does not read."""
    texts = value if isinstance(value, list) else [value]
    longest = max((len(text.encode()) for text in texts if isinstance(text, str)), default=0)
    if longest > STRING_LIMIT_BYTES:
        raise PlanError(f"key {shown(key)}: a text of {longest} bytes, expected at most {STRING_LIMIT_BYTES}")


def _check_name(name: str) -> None:
    if len(name.encode()) > NAME_LIMIT_BYTES:
        raise PlanError(f"tensor {shown(name)}: its name has {len(name.encode())} bytes, GGUF readers take at most 63")


def _shard(file: str, header: bytes, specs: Sequence[GGUFSpec]) -> Shard:
    header += bytes(-len(header) % ALIGNMENT)
    offsets, end = {}, len(header)
    for spec in specs:
        offsets[spec.name] = end
        end += spec.nbytes + -spec.nbytes % ALIGNMENT
    return Shard(file, header, {spec.name: spec for spec in specs}, offsets, end)


def _seal(header: bytes, key: str) -> tuple[int, int]:
    """Where the placeholder stands: after the key, the value's type and its length."""
    value = int(GGUFValueType.STRING).to_bytes(4, "little") + len(UNSEALED).to_bytes(8, "little")
    entry = key.encode() + value + UNSEALED.encode()
    if header.count(entry) != 1:
        raise PlanError(f"{shown(key)}: stands in the metadata's texts as well, so that it cannot be filled in")
    stop = header.index(entry) + len(entry)
    return stop - len(UNSEALED), stop
