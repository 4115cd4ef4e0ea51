"""Hidden states in files: read as they were written, and believed only where their hashes say so."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mlxquant.calibrate.streams import FULL, QUANTIZED, Streams
from mlxquant.errors import SourceError

SHAPE = (5, 8, 4)


def states(seed=0):
    return np.random.default_rng(seed).standard_normal(SHAPE).astype(np.float32)


def kept(folder, layer, records=()):
    streams = Streams(folder, SHAPE)
    sums = {kind: streams.of(kind, layer).write(iter(states(i))) for i, kind in enumerate((FULL, QUANTIZED))}
    streams.finish(layer, sums, list(records))
    return streams


@pytest.mark.parametrize("tokens", [1, 8, 20, 1000])
def test_batches_are_what_was_written(tmp_path, tokens):
    stream = kept(tmp_path, 0).of(QUANTIZED, 0)
    parts = list(stream.batches(tokens))
    assert np.array_equal(np.concatenate([part for _, part in parts]), states(1))
    assert [index for where, _ in parts for index in range(where.start, where.stop)] == list(range(5))


def test_the_last_whole_layer_is_gone_on_from_with_its_records(tmp_path):
    kept(tmp_path, 0)
    kept(tmp_path, 3, [{"name": "a"}])
    assert Streams(tmp_path, SHAPE).resume() == (3, [{"name": "a"}])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["done-0003.json", "full-0003.f32", "quantized-0003.f32"]


@pytest.mark.parametrize("damage", ["shorter", "other", "gone", "torn note", "note of something else"])
def test_nothing_is_believed_that_has_not_its_hash(tmp_path, damage):
    kept(tmp_path, 2)
    path, note = tmp_path / "full-0002.f32", tmp_path / "done-0002.json"
    if damage == "shorter":
        path.write_bytes(path.read_bytes()[:-4])
    elif damage == "other":
        path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\0")
    elif damage == "gone":
        path.unlink()
    elif damage == "torn note":
        note.write_bytes(note.read_bytes()[:-9])
    else:
        note.write_text(json.dumps(["sha256"]))
    assert Streams(tmp_path, SHAPE).resume() == (-1, [])


def test_a_file_cut_short_is_an_error_and_no_states(tmp_path):
    stream = kept(tmp_path, 0).of(FULL, 0)
    stream.path.write_bytes(stream.path.read_bytes()[:-4])
    with pytest.raises(SourceError, match=r"full-0000\.f32"):
        list(stream.batches())
