"""Sizes and labels against other accounts of the same files; hashes against hashlib and sha256sum's notion."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import time

import gguf
import mlx_lm
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mlxquant.errors import SourceError
from mlxquant.measure.size import sha256_of, size_of, tokenizer_sha256
from mlxquant.run.text import Text
from tests.cli.runner import mlxquant
from tests.gguf_files import write_gguf
from tests.tiny import make

UNIFORM = ("--recipe", "uniform")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("size")
    make(folder / "hf", "llama", width=256)
    return folder


def tensor_bytes(folder):
    return sum(a.nbytes for path in folder.glob("*.safetensors") for a in load_file(path).values())


def test_a_float_folder(home):
    size = size_of(home / "hf")
    weights = sum(a.size for a in load_file(home / "hf" / "model.safetensors").values())
    assert (size.nbytes, size.parameters, size.bpw, size.label) == (2 * weights, weights, 16.0, "BF16")


def test_most_weights_give_the_label_not_most_tensors(tmp_path):
    tensors = {"a": np.zeros((64, 64), np.float16), "b": np.zeros(64, np.float32), "c": np.zeros(64, np.float32)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "nobody"}')
    assert size_of(tmp_path).label == "F16"


@pytest.mark.parametrize(
    ("options", "label"),
    [
        (("--bits", 4), "4 and 6 bit affine, group size 64"),  # balanced: more for the head
        (("--bits", 4, *UNIFORM), "4 bit affine, group size 64"),
        (("--bits", 3, *UNIFORM, "--group-size", 32), "3 bit affine, group size 32"),
        (("--bits", 4, *UNIFORM, "--set", ".*down_proj=6g128", "--set", ".*up_proj=8g32"),
         "4, 6 and 8 bit affine, group size 32, 64 and 128"),
        (("--bits", 4, *UNIFORM, "--set", ".*_proj=mxfp4"), "mxfp4 and 4 bit affine, group size 64"),
    ],
)  # fmt: skip
def test_an_mlx_folder(home, tmp_path, options, label):
    out = tmp_path / "out"
    assert mlxquant("convert", home / "hf", "-o", out, *options).code == 0
    size = size_of(out)
    assert size.label == label
    assert size.nbytes == tensor_bytes(out)
    assert size.parameters == size_of(home / "hf").parameters
    assert size.bpw == 8 * size.nbytes / size.parameters


def test_a_folder_of_stock_mlx_lm(home, monkeypatch):
    monkeypatch.chdir(home)
    mlx_lm.convert("hf", "stock", quantize=True, q_bits=4, q_mode="mxfp4")
    size = size_of(home / "stock")
    assert size.label == "mxfp4"
    assert size.nbytes == tensor_bytes(home / "stock")


def packed_by_others(home, name, **block):
    shutil.copytree(home / "hf", home / name)
    config = json.loads((home / "hf" / "config.json").read_text())
    (home / name / "config.json").write_text(json.dumps(config | {"quantization_config": block}))
    return size_of(home / name).label


def test_folders_packed_by_others(home):
    assert packed_by_others(home, "awq", quant_method="awq", bits=4) == "4 bit awq"
    assert packed_by_others(home, "fp8", quant_method="fp8") == "fp8"


@pytest.mark.parametrize(
    ("file_type", "label"),
    [(15, "Q4_K_M"), (2, "Q4_0"), (26, "IQ3_S"), (38, "MXFP4_MOE"), (999, "Q8_0"), (None, "Q8_0"), ("Q4_K_M", "Q8_0")],
)
def test_a_gguf_file(home, tmp_path, file_type, label):
    """file_type as people say it; its most frequent type where that says nothing."""
    file = write_gguf(home / "hf", tmp_path / "m.gguf", "Q8_0", **{"general__file_type": file_type})
    size, tensors = size_of(file), gguf.GGUFReader(file).tensors
    assert size.label == label
    assert size.nbytes == sum(int(t.n_bytes) for t in tensors)
    assert size.parameters == sum(int(t.n_elements) for t in tensors) == size_of(home / "hf").parameters
    assert size.bpw == 8 * size.nbytes / size.parameters


def test_a_tied_head_counts_once(tmp_path):
    make(tmp_path / "tied", "llama", tied=True)
    alone = size_of(tmp_path / "tied")
    arrays = load_file(tmp_path / "tied" / "model.safetensors")
    twice = arrays | {"lm_head.weight": arrays["model.embed_tokens.weight"]}
    save_file(twice, tmp_path / "tied" / "model.safetensors", {"format": "pt"})
    both = size_of(tmp_path / "tied")
    assert (both.parameters, both.bpw) == (alone.parameters, alone.bpw)
    assert both.nbytes == alone.nbytes + arrays["model.embed_tokens.weight"].nbytes


def test_what_is_no_model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for call in (size_of, sha256_of):
        with pytest.raises(SourceError, match="safetensors"):
            call(tmp_path)
    save_file({"empty": np.zeros((0, 4), np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(SourceError, match="no weights"):
        size_of(tmp_path)
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(10))
    for call in (size_of, sha256_of):
        with pytest.raises(SourceError, match=r"a\.gguf"):
            call(tmp_path / "a.gguf")


# --- which model it is


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def combined(files):
    lines = [f"{name} {path.stat().st_size} {sha256(path)}\n" for name, path in sorted(files.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def test_a_folder_is_its_config_and_weights(home):
    folder = home / "hf"
    names = ("config.json", "model.safetensors")
    assert sha256_of(folder) == combined({name: folder / name for name in names})


def test_other_files_do_not_count_but_each_bit_of_these_does(home, tmp_path):
    shutil.copytree(home / "hf", tmp_path / "same")
    before = sha256_of(home / "hf")
    (tmp_path / "same" / "README.md").write_text("News.")
    (tmp_path / "same" / "tokenizer_config.json").unlink()
    assert sha256_of(tmp_path / "same") == before
    config, weights = tmp_path / "same" / "config.json", tmp_path / "same" / "model.safetensors"
    config.write_bytes(b" " + config.read_bytes())
    assert sha256_of(tmp_path / "same") != before
    shutil.copy(home / "hf" / "config.json", config)
    assert sha256_of(tmp_path / "same") == before
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert sha256_of(tmp_path / "same") != before


def test_a_gguf_file_is_its_own_hash(home, tmp_path):
    file = write_gguf(home / "hf", tmp_path / "m.gguf", "Q8_0")
    assert sha256_of(file) == sha256(file)


def test_a_split_gguf_is_all_of_its_parts(home, tmp_path):
    for stem in ("a", "b"):
        (tmp_path / stem).mkdir()
        options = ("-o", tmp_path / stem / f"{stem}.gguf", "--type", "Q8_0", "--split-max-size", "300K")
        assert mlxquant("convert", home / "hf", *options).code == 0
    parts = sorted((tmp_path / "a").glob("*.gguf"))
    assert len(parts) > 2
    found = sha256_of(parts[0])
    assert found == combined({str(i): part for i, part in enumerate(parts)})
    assert sha256_of(min((tmp_path / "b").glob("*.gguf"))) == found  # by another name the same model
    data = bytearray(parts[-1].read_bytes())
    data[-1] ^= 1
    parts[-1].write_bytes(data)
    assert sha256_of(parts[0]) != found


def sharded(folder, count):
    """`count` weight files, enough bytes for several blocks."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(1, count + 1):
        name = f"model-{i:05d}-of-{count:05d}.safetensors"
        save_file({f"w{i}": rng.integers(0, 256, (9, 2**20), np.uint8)}, folder / name)
    (folder / "config.json").write_text("{}")
    return folder


def test_progress_of_several_files(tmp_path):
    folder, seen, busy = sharded(tmp_path / "m", 3), [], threading.Lock()

    def progress(done, total):
        assert busy.acquire(blocking=False), "two calls at once"
        time.sleep(0.002)
        seen.append((done, total))
        busy.release()

    assert sha256_of(folder, progress) == combined({path.name: path for path in folder.iterdir()})
    total = sum(path.stat().st_size for path in folder.iterdir())
    assert {t for _, t in seen} == {total}
    assert [d for d, _ in seen] == sorted({d for d, _ in seen})
    assert seen[-1][0] == total
    assert len(seen) >= 3 * 3


def test_a_failure_comes_through_threads(tmp_path):
    folder = sharded(tmp_path / "m", 3)

    def progress(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sha256_of(folder, progress)


# --- which tokenizer it is


def test_a_tokenizer_is_what_it_does(home, tmp_path):
    shutil.copytree(home / "hf", tmp_path / "same")
    before = tokenizer_sha256(Text.load(home / "hf"))
    config = json.loads((tmp_path / "same" / "tokenizer_config.json").read_text())
    (tmp_path / "same" / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "{{ messages }}"}))
    pipeline = json.loads((tmp_path / "same" / "tokenizer.json").read_text())
    (tmp_path / "same" / "tokenizer.json").write_text(json.dumps(pipeline, indent=9))
    text = Text.load(tmp_path / "same")
    assert tokenizer_sha256(text) == before
    text.tokenizer.encode("x", truncation=True, max_length=3)  # leaves its setting in the pipeline
    assert tokenizer_sha256(text) == before
    pipeline["model"]["merges"] = pipeline["model"]["merges"][:-1]
    (tmp_path / "same" / "tokenizer.json").write_text(json.dumps(pipeline))
    assert tokenizer_sha256(Text.load(tmp_path / "same")) != before


class Slow:
    """A tokenizer written in Python, as far as it is asked."""

    def __init__(self, vocab, merges):
        self.bpe_ranks = {pair: i for i, pair in enumerate(merges)}
        self.get_vocab = lambda: vocab


def test_a_tokenizer_written_in_python():
    texts = [
        Text(Slow(vocab, merges), (), "slow")
        for vocab, merges in [
            ({"a": 0, "b": 1}, [("a", "b"), ("b", "b")]),
            ({"b": 1, "a": 0}, [("a", "b"), ("b", "b")]),
            ({"a": 0, "b": 1}, [("b", "b"), ("a", "b")]),
            ({"a": 1, "b": 0}, [("a", "b"), ("b", "b")]),
        ]
    ]
    found = [tokenizer_sha256(text) for text in texts]
    assert found[0] == found[1]
    assert len(set(found)) == 3
