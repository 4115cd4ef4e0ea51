"""assign and ShardWriter: packing, the format's own laws, and disks that say no."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from mlxquant.codecs.spec import affine
from mlxquant.errors import TargetError
from mlxquant.files.safetensors_file import read_header
from mlxquant.files.shards import LIMIT_BYTES, ShardWriter, assign, check_space, index_json
from mlxquant.files.writing import flush, target_error, write_all
from mlxquant.tensors import DTYPES, TensorSpec

GROUPS = [
    [
        *affine(4, 32).parts(f"layers.{i}.mlp.weight", (rows, 64), "F16"),
        TensorSpec(f"layers.{i}.flag", (3,), "U8"),
    ]
    for i, rows in enumerate((8, 24, 16))
]
GROUPS += [[TensorSpec("norm.weight", (5,), "F32")], [TensorSpec("empty", (0, 4), "F16")]]


def content(spec: TensorSpec, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng([seed, *spec.name.encode()])
    raw = rng.integers(0, 256, size=spec.nbytes, dtype=np.uint8).view(DTYPES[spec.dtype].numpy)
    return raw.reshape(spec.shape)


def write(folder: Path, shards) -> dict[str, np.ndarray]:
    """All tensors in chunks of two rows, in the order of the names: not the order of the file."""
    written = {}
    for shard in shards:
        writer = ShardWriter(folder, shard)
        writer.prepare()
        for name in sorted(shard.specs):
            array = written[name] = content(shard.specs[name])
            rows = array.reshape(shard.specs[name].rows, -1) if array.size else array
            for start in range(0, len(rows), 2):
                writer.write(name, rows[start : start + 2])
            assert writer.sha256(name) == hashlib.sha256(array.tobytes()).hexdigest()
            assert writer.stored_sha256(name) == writer.sha256(name)
    return written


@pytest.mark.parametrize("limit", [10**9, 2500, 1300])
def test_what_is_written_the_library_and_mlx_read(tmp_path, limit):
    shards = assign(GROUPS, limit)
    written = write(tmp_path, shards)
    found: dict[str, np.ndarray] = {}
    for shard in shards:
        path = tmp_path / shard.file
        assert path.stat().st_size == shard.nbytes
        found |= load_file(path)
        arrays, metadata = mx.load(str(path), return_metadata=True)
        assert metadata == {"format": "mlx"}
        for name, array in arrays.items():
            assert np.array(array).tobytes() == written[name].tobytes()
        with safe_open(path, framework="numpy") as file:
            assert file.metadata() == {"format": "mlx"}
    assert found.keys() == written.keys()
    assert all(found[name].tobytes() == array.tobytes() for name, array in written.items())


@pytest.mark.parametrize("seed", range(20))
def test_laws_of_packing(seed, tmp_path):
    rng = random.Random(seed)
    groups = [
        [
            TensorSpec(f"t{i}.{j}", (rng.randrange(1, 40), rng.randrange(1, 30)), rng.choice(list(DTYPES)))
            for j in range(rng.randrange(1, 4))
        ]
        for i in range(rng.randrange(1, 25))
    ]
    limit = rng.choice((2_000, 5_000, 20_000))
    shards = assign(groups, limit)
    order = [spec for shard in shards for spec in shard.specs.values()]
    assert Counter(order) == Counter(spec for group in groups for spec in group)
    home = {name: shard.file for shard in shards for name in shard.specs}
    for shard in shards:
        assert shard.nbytes <= limit or len(shard.specs) == 1
        end = len(shard.header)
        assert end % 8 == 0
        for name, spec in shard.specs.items():
            assert shard.offsets[name] == end
            assert end % DTYPES[spec.dtype].itemsize == 0
            end += spec.nbytes
        assert end == shard.nbytes
        ShardWriter(tmp_path, shard).prepare()
        header = read_header(tmp_path / shard.file)
        assert (header.specs, header.offsets) == (shard.specs, shard.offsets)
    for group in groups:
        if sum(spec.nbytes + 200 for spec in group) <= limit:
            assert len({home[spec.name] for spec in group}) == 1
    files = [home[group[0].name] for group in groups]
    assert files == sorted(files)


def test_no_shard_is_longer_than_5_gb():
    gigabyte = [[TensorSpec(f"{i}.weight", (2**14, 2**14), "F32")] for i in range(12)]
    shards = assign(gigabyte)
    assert len(shards) == 3
    assert all(shard.nbytes <= 5 * 10**9 for shard in shards)
    assert LIMIT_BYTES == 5 * 10**9


def test_names_of_files_and_the_index():
    (single,) = assign(GROUPS)
    assert single.file == "model.safetensors"
    shards = assign(GROUPS, 1300)
    count = len(shards)
    assert [s.file for s in shards] == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    index = json.loads(index_json(shards, 1234))
    assert index["metadata"] == {
        "total_size": sum(spec.nbytes for group in GROUPS for spec in group),
        "total_parameters": 1234,
    }
    assert index["weight_map"] == {name: shard.file for shard in shards for name in shard.specs}
    assert list(index["weight_map"]) == sorted(index["weight_map"])


def test_a_name_planned_twice():
    with pytest.raises(ValueError, match="norm is planned twice"):
        assign([[TensorSpec("norm", (1,), "F32")], [TensorSpec("norm", (1,), "F32")]])


def test_a_tensor_written_too_long_or_too_short(tmp_path):
    writer = ShardWriter(tmp_path, assign([[TensorSpec("t", (4,), "F32")]])[0])
    with pytest.raises(ValueError, match="0 bytes written, 16 planned"):
        writer.sha256("t")
    writer.write("t", np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="12 bytes written, 16 planned"):
        writer.sha256("t")
    with pytest.raises(ValueError, match="20 bytes written, 16 planned"):
        writer.write("t", np.zeros(2, np.float32))


def test_an_intact_file_is_kept_and_another_is_not(tmp_path):
    (shard,) = assign(GROUPS)
    written = write(tmp_path, [shard])
    before = (tmp_path / shard.file).read_bytes()
    ShardWriter(tmp_path, shard).prepare()
    assert (tmp_path / shard.file).read_bytes() == before
    (other,) = assign([*GROUPS, [TensorSpec("more", (1,), "F32")]])
    ShardWriter(tmp_path, other).prepare()
    assert (tmp_path / other.file).stat().st_size == other.nbytes
    assert not load_file(tmp_path / other.file)["layers.0.mlp.weight"].any()
    assert written["layers.0.mlp.weight"].any()


def test_tensors_may_be_written_from_threads(tmp_path):
    specs = [TensorSpec(f"t{i}", (64, 33), "F16") for i in range(8)]
    (shard,) = assign([specs])
    writer = ShardWriter(tmp_path, shard)

    def fill(spec: TensorSpec) -> None:
        for row in content(spec):
            writer.write(spec.name, row)

    threads = [threading.Thread(target=fill, args=(spec,)) for spec in specs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = load_file(tmp_path / shard.file)
    assert all(found[s.name].tobytes() == content(s).tobytes() for s in specs)


def test_space_is_checked_before_the_first_byte(tmp_path):
    huge = assign([[TensorSpec("huge", (2**30, 2**24), "F32")]])
    with pytest.raises(TargetError, match=r"needed, .* free on this disk") as caught:
        check_space(tmp_path / "not there yet", huge)
    assert caught.value.hint
    assert not list(tmp_path.iterdir())
    with pytest.raises(TargetError, match="needed"):
        check_space(tmp_path, assign(GROUPS), reserve_bytes=2**60)
    check_space(tmp_path, assign(GROUPS))


def test_what_is_already_written_needs_no_space(tmp_path, monkeypatch):
    (shard,) = assign([[TensorSpec("t", (2**20,), "F32")]])
    writer = ShardWriter(tmp_path, shard)
    writer.write("t", np.ones(2**20, np.float32))
    flush(writer.path)
    monkeypatch.setattr("mlxquant.files.shards.free_bytes", lambda path: shard.nbytes // 2)
    with pytest.raises(TargetError):
        check_space(tmp_path / "elsewhere", [shard])
    check_space(tmp_path, [shard])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_as_the_kernel_tells_it():
    fd = os.open("/dev/full", os.O_WRONLY)
    try:
        with pytest.raises(OSError) as caught:
            write_all(fd, 0, memoryview(bytes(10)))
    finally:
        os.close(fd)
    error = target_error(Path("/dev/full"), caught.value, 5 * 10**9)
    assert "the disk is full (5 GB needed, " in error.message
    assert "run the same command again" in str(error.hint)


LIMITED = """
import resource, sys
from pathlib import Path
import numpy as np
from mlxquant.errors import TargetError
from mlxquant.files.shards import ShardWriter, assign
from mlxquant.tensors import TensorSpec
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
(shard,) = assign([[TensorSpec("t", (4096,), "F32")]])
try:
    ShardWriter(Path(sys.argv[1]), shard).write("t", np.ones(4096, np.float32))
except TargetError as error:
    print(error.message, "|", error.hint)
"""


def test_a_file_longer_than_the_system_allows(tmp_path):
    """What FAT disks say for 4 GB, said by a limit of 4096 bytes."""
    done = subprocess.run([sys.executable, "-c", LIMITED, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{tmp_path}/model.safetensors: cannot be written: ")
    assert "no file this long" in done.stdout


def test_a_folder_that_cannot_be_written_even_by_root(tmp_path):
    (tmp_path / "file").write_text("")
    (shard,) = assign(GROUPS)
    with pytest.raises(TargetError, match="a part of the path is a file"):
        ShardWriter(tmp_path / "file", shard).prepare()


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (errno.EROFS, "read-only"),
        (errno.EACCES, "permission denied"),
        (errno.EDQUOT, "quota"),
        (errno.EIO, "disk"),
    ],
)
def test_each_fault_is_one_line_with_a_next_step(tmp_path, code, says):
    error = target_error(tmp_path / "x", OSError(code, os.strerror(code)))
    assert says in error.message
    assert error.message.startswith(str(tmp_path))
    assert error.hint
