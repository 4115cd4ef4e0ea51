"""`remote_specs`: what a Hub model is, for kilobytes; and files that lie about themselves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from mlxquant.errors import HubError, MlxquantError, SourceError, UnsupportedError, UsageError
from mlxquant.hub.headers import parse_header, remote_specs
from mlxquant.hub.pull import pull
from mlxquant.tensors import TensorSpec
from tests.fake_hub import FakeHub
from tests.hub.repos import CONFIG, sharded, single, tensors


def expected() -> dict[str, TensorSpec]:
    return {name: TensorSpec(name, array.shape, "F16") for name, array in tensors().items()}


def header(**rows: object) -> bytes:
    return json.dumps(rows).encode()


def safetensors_bytes(head: bytes, data: bytes = b"") -> bytes:
    return len(head).to_bytes(8, "little") + head + data


@pytest.mark.parametrize("make", [single, sharded])
def test_specs_and_config_are_those_of_the_files(fake_hub: FakeHub, tmp_path: Path, make):
    sha = fake_hub.add("org/model", make(tmp_path / "repo"))
    remote = remote_specs("org/model")
    assert remote.specs == expected()
    assert remote.config == CONFIG
    assert remote.revision == sha
    listed = fake_hub.repos["org/model"].commits[sha]
    assert {f.name: (f.nbytes, f.sha256) for f in remote.files} == {
        n: (e.size, e.sha256) for n, e in listed.items() if n.endswith(".safetensors")
    }


def big(folder: Path, head_pad: int = 0) -> Path:
    """40 MB of weights in a sparse file; head_pad widens the header beyond the first request."""
    single(folder)
    size = 40 * 10**6
    head = header(w={"dtype": "F16", "shape": [size // 2], "data_offsets": [0, size]}) + b" " * head_pad
    with (folder / "model.safetensors").open("wb") as file:
        file.write(safetensors_bytes(head))
        file.truncate(8 + len(head) + size)
    return folder


@pytest.mark.parametrize("head_pad", [0, 250_000])
def test_no_weights_are_downloaded(fake_hub: FakeHub, tmp_path: Path, head_pad: int):
    fake_hub.add("org/model", big(tmp_path / "repo", head_pad))
    assert remote_specs("org/model").specs["w"].nbytes == 40 * 10**6
    assert fake_hub.served("safetensors") < 100_001 + head_pad
    assert fake_hub.served() < 120_000 + head_pad


@pytest.mark.parametrize("head_pad", [0, 250_000])
def test_a_server_that_ignores_ranges_is_hung_up_on(fake_hub: FakeHub, tmp_path: Path, head_pad: int):
    fake_hub.add("org/model", big(tmp_path / "repo", head_pad))
    remote_specs("org/model")  # imports do not count
    # The server, in this process, holds the file once, on a busy machine twice, as its first answer is slow to end; a
    # client that read on would hold it again, each time. Hence the least of some tries.
    assert min(peak_of_ignored_ranges(fake_hub) for _ in range(4)) < 60 * 10**6


def peak_of_ignored_ranges(fake_hub: FakeHub) -> int:
    fake_hub.fail("safetensors", ignore_range=True, times=2)
    tracemalloc.start()
    try:
        assert remote_specs("org/model").specs["w"].nbytes == 40 * 10**6
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_what_the_cache_has_is_read_there(fake_hub: FakeHub, tmp_path: Path):
    fake_hub.add("org/model", sharded(tmp_path / "repo"))
    pull("org/model")
    fake_hub.record.clear()
    assert remote_specs("org/model").specs == expected()
    assert fake_hub.served("safetensors") == 0
    script = "from mlxquant.hub.headers import remote_specs; print(len(remote_specs('org/model').specs))"
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    assert int(done.stdout) == len(expected())


def test_a_503_is_asked_again(fake_hub: FakeHub, tmp_path: Path):
    fake_hub.add("org/model", single(tmp_path / "repo"))
    fake_hub.fail("model.safetensors", status=503)
    assert remote_specs("org/model").specs == expected()


def test_a_gated_repo_is_said(fake_hub: FakeHub, tmp_path: Path):
    fake_hub.add("org/model", single(tmp_path / "repo"))
    fake_hub.gate("org/model")
    with pytest.raises(HubError, match="gated"):
        remote_specs("org/model")


def test_only_whole_models_have_specs():
    with pytest.raises(UsageError):
        remote_specs("org/model/file.gguf")


W = {"dtype": "F16", "shape": [2, 4], "data_offsets": [0, 16]}
GOOD = header(w=W)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "announces a header"),
        (b"short", "announces a header"),
        (b"<html>log in to this network first</html>", "announces a header"),
        ((10**9).to_bytes(8, "little") + b"{}", "1,000,000,000 bytes"),
        ((2**64 - 1).to_bytes(8, "little") + b"{}", "announces a header"),
        (safetensors_bytes(b"{not json}"), "not JSON"),
        (safetensors_bytes(b"\xff\xfe{}"), "not JSON"),
        (safetensors_bytes(b"[" * 90_000), "not JSON"),
        (safetensors_bytes(b"[1]"), "no JSON object"),
        (safetensors_bytes(header(w=3)), "no shape"),
        (safetensors_bytes(header(w=W | {"shape": [2, -4]}), b"0" * 16), "no shape"),
        (safetensors_bytes(header(w=W | {"shape": [2, 4.0]}), b"0" * 16), "no shape"),
        (safetensors_bytes(header(w=W | {"shape": [True, 8]}), b"0" * 16), "no shape"),
        (safetensors_bytes(header(w=W | {"shape": [2**70]}), b"0" * 16), "no shape"),
        (safetensors_bytes(header(w=W | {"dtype": "Q4"}), b"0" * 16), "'Q4'"),
        (safetensors_bytes(header(w=W | {"dtype": ["F16"]}), b"0" * 16), "['F16']"),
        (safetensors_bytes(header(w=W | {"data_offsets": [0, 15]}), b"0" * 16), "takes 16"),
        (safetensors_bytes(header(w=W | {"data_offsets": [16, 0]}), b"0" * 16), "takes 16"),
        (safetensors_bytes(header(w=W | {"data_offsets": "0-16"}), b"0" * 16), "no data offsets"),
        (safetensors_bytes(GOOD, b"0" * 15), "16 bytes and holds 15"),
        (safetensors_bytes(GOOD, b"0" * 17), "16 bytes and holds 17"),
        (safetensors_bytes(header(v=W, w=W), b"0" * 16), "32 bytes and holds 16"),
    ],
)
def test_files_that_lie_end_in_one_line(fake_hub: FakeHub, tmp_path: Path, content: bytes, told: str):
    folder = single(tmp_path / "repo")
    (folder / "model.safetensors").write_bytes(content)
    fake_hub.add("org/model", folder)
    with pytest.raises(SourceError) as caught:
        remote_specs("org/model")
    assert told in caught.value.message
    assert caught.value.message.startswith("org/model/model.safetensors")
    assert "\n" not in caught.value.message


def test_unknown_dtypes_are_unsupported_rather_than_broken():
    with pytest.raises(UnsupportedError):
        parse_header(header(w=W | {"dtype": "F4"}), 16, "file")


def test_the_same_tensor_in_two_shards(fake_hub: FakeHub, tmp_path: Path):
    folder = sharded(tmp_path / "repo")
    first, second = sorted(folder.glob("*.safetensors"))
    second.write_bytes(first.read_bytes())
    fake_hub.add("org/model", folder)
    with pytest.raises(SourceError, match="a second time"):
        remote_specs("org/model")


@pytest.mark.parametrize("config", ["", "[]", "<html>", '"x"', "[" * 99999])
def test_a_config_that_is_none(fake_hub: FakeHub, tmp_path: Path, config: str):
    folder = single(tmp_path / "repo")
    (folder / "config.json").write_text(config)
    fake_hub.add("org/model", folder)
    with pytest.raises(MlxquantError, match=r"org/model/config\.json"):
        remote_specs("org/model")


def test_sizes_that_the_listing_lies_about(fake_hub: FakeHub, tmp_path: Path):
    folder = single(tmp_path / "repo")
    sha = fake_hub.add("org/model", folder)
    entry = fake_hub.repos["org/model"].commits[sha]["model.safetensors"]
    entry.size += 1000
    with pytest.raises(SourceError, match="holds"):
        remote_specs("org/model")


@pytest.mark.parametrize("cut_at", [0, 100])
def test_a_connection_that_breaks_in_a_header_is_one_line(fake_hub: FakeHub, tmp_path: Path, cut_at: int):
    fake_hub.add("org/model", single(tmp_path / "repo"))
    fake_hub.fail("model.safetensors", cut_at=cut_at)
    with pytest.raises(HubError, match=rf"model.safetensors gave {cut_at} bytes") as caught:
        remote_specs("org/model")
    assert caught.value.hint == "run the same command again"
    assert remote_specs("org/model").specs == expected()
