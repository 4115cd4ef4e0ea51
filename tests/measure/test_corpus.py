"""The text that models are compared on: files as they are, hostile ones refused, the built-in text the same always."""

from __future__ import annotations

import hashlib
import json
import platform
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from mlxquant.errors import MlxquantError, SourceError, UnsupportedError, UsageError
from mlxquant.measure import corpus
from mlxquant.measure.corpus import SOURCES, _topics, load_corpus
from tests.fake_hub import FakeHub


def refused(path: Path | str, kind: type[MlxquantError], match: str) -> MlxquantError:
    with pytest.raises(kind, match=match) as caught:
        load_corpus(str(path))
    assert "\n" not in caught.value.message
    return caught.value


# -- files


def test_a_text_file_as_it_is(tmp_path: Path) -> None:
    text = "Grüße, мир! 你好\r\n\n  two  spaces\u2028\tand tabs\n"
    path = tmp_path / "some text.md"
    path.write_bytes(text.encode())
    found = load_corpus(str(path))
    assert found.text == text
    assert found.label == "some text.md", "no folders: labels are published"
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfText")
    assert load_corpus(str(tmp_path / "a.txt")).text == "Text"


def test_records_stand_below_one_another(tmp_path: Path) -> None:
    records = ["one", "two\n", "", "a\u2028b\nc"]
    path = tmp_path / "a.jsonl"
    path.write_text("\n\n".join(json.dumps({"id": 1, "text": r}, ensure_ascii=False) for r in records) + "\n")
    assert load_corpus(str(path)).text == "one\ntwo\n\na\u2028b\nc\n"


@pytest.mark.parametrize(
    ("name", "data", "match"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b" \n\t\n", "holds no text"),
        ("a.txt", b"GGUF\x03\0\0\0", "is binary"),
        ("a.txt", "Grüße".encode("utf-16"), "not UTF-8|is binary"),
        ("a.txt", "Grüße".encode("latin-1"), r"not UTF-8 \(byte 0xfc at 2\)"),
        ("a.jsonl", b"\n", "holds no text"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b"\n', "line 2 is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"content": "b"}\n', 'line 2 has no "text"'),
        ("a.json", b'[{"text": "a"}]\n', 'line 1 has no "text"'),
        ("a.jsonl", b'{"text": 5}', 'line 1 has no "text"'),
        ("a.jsonl", b"[" * 100_000, "line 1 is not JSON"),
        ("a.jsonl", b"9" * 10_000, "line 1"),
        ("a.jsonl", b'{"text": "\\ud800"}', "which is no character"),
    ],
)
def test_files_that_are_no_text(tmp_path: Path, name: str, data: bytes, match: str) -> None:
    (tmp_path / name).write_bytes(data)
    error = refused(tmp_path / name, SourceError, match)
    assert name in error.message


def test_a_file_too_large_to_be_text_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a.txt").open("wb") as file:
        file.write(b"text " * 1000)
        file.truncate(2**40)  # sparse: it takes no room
    refused(tmp_path / "a.txt", SourceError, r"a\.txt: .* of text, expected at most")


def test_weights_are_no_text_however_large(tmp_path: Path) -> None:
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(2**40)
    refused(tmp_path / "model.safetensors", SourceError, "is binary")


def test_names_that_are_no_text(tmp_path: Path) -> None:
    refused(tmp_path, SourceError, "is a folder")
    refused("nothing-here.txt", UsageError, "neither a text file that exists nor a dataset")
    refused("data/nothing-here.txt", UsageError, "no such file")
    refused("org/../x/y.txt", UsageError, "neither")
    refused("x" * 5000, UsageError, "neither")
    (tmp_path / "a.txt").write_text("text")
    for spec in (str(tmp_path / "a.txt"), "builtin"):
        with pytest.raises(UsageError, match="revision"):
            load_corpus(spec, "main")


def test_parquet_without_its_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # what import sees where it is not installed
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    error = refused(tmp_path / "a.parquet", UnsupportedError, "pyarrow, which is not installed")
    assert "pip install 'mlxquant[parquet]'" in (error.hint or "")


def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": [1, 2, 3], "text": ["", " = Title = \n", "end"]}), path)
    assert load_corpus(str(path)).text == "\n = Title = \nend\n"
    pq.write_table(pa.table({"content": ["a"]}), path)
    refused(path, SourceError, 'no column "text", but')
    pq.write_table(pa.table({"text": [1, 2]}), path)
    refused(path, SourceError, 'no "text"')
    path.write_bytes(b"PAR1" + b"x" * 100 + b"PAR1")
    refused(path, SourceError, "cannot be read as Parquet")
    pq.write_table(pa.table({"text": ["equal text " * 100] * 10_000}), path)
    monkeypatch.setattr(corpus, "TEXT_LIMIT_BYTES", 2**20)
    assert path.stat().st_size < 2**20, "a small file of much text"
    refused(path, SourceError, "expected at most 1")


def test_a_dataset_says_which_commit_and_file(fake_hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "repo" / "data").mkdir(parents=True)
    (tmp_path / "repo" / "data" / "test.jsonl").write_text('{"text": "from the Hub"}\n')
    (tmp_path / "repo" / "broken.txt").write_bytes(b"\xff")
    sha = fake_hub.add("datasets/org/texts", tmp_path / "repo")
    found = load_corpus("org/texts")
    assert found.text == "from the Hub\n"
    assert found.label == f"org/texts@{sha[:12]}: data/test.jsonl"
    assert load_corpus("org/texts/data/test.jsonl", "main") == found
    refused("org/texts/broken.txt", SourceError, r"^org/texts/broken\.txt: is not UTF-8")


# -- the built-in text


def test_built_in_text_says_what_it_is() -> None:
    found = load_corpus("builtin")
    assert f"Python {platform.python_version()}" in found.label
    assert "not WikiText" in found.label
    assert "without" not in found.label, "every module is there"
    assert 900_000 < len(found.text) < 1_300_000
    assert found.sha256 == hashlib.sha256(found.text.encode()).hexdigest()


def test_any_part_has_prose_and_code() -> None:
    text, width = load_corpus("builtin").text, 25_000
    prose = [p for topic in _topics() for p in topic.split("\n\n") if len(p) > 100]
    for start in range(0, len(text) - width, width):
        part = text[start : start + width]
        assert sum(p in part for p in prose) >= 3, start
        assert len(re.findall(r"^ *(?:def|class|return|if|for) ", part, re.MULTILINE)) >= 10, start
    modules = len(SOURCES)
    assert text[: modules * 12_000].count("\nimport ") > 20, "many modules, not the whole of the first"


def test_built_in_text_names_no_special_token_and_no_path() -> None:
    text = load_corpus("builtin").text
    named = r"<\|[\w ]+\|>|</?(?:s|unk|pad|bos|eos|mask|cls|sep|think|tool_call|start_of_turn|end_of_turn)>"
    assert re.findall(named, text) == []
    assert re.findall(r"\[/?(?:INST|PAD|CLS|SEP|UNK|gMASK)\]", text) == []
    assert sysconfig.get_path("stdlib") not in text
    assert not re.search(r"[^\n\f\x20-\U0010ffff]", text), "no control characters"


def test_no_paragraph_of_the_reference_twice() -> None:
    paragraphs = [" ".join(p.split()) for topic in _topics() for p in topic.split("\n\n")]
    assert len(set(paragraphs)) > 0.98 * len(paragraphs) > 500  # within one topic it may


def test_built_in_text_is_the_same_in_another_process(tmp_path: Path) -> None:
    """Whatever the hash seed and the folder, where files named like modules of the library lie."""
    for name in ("sched.py", "graphlib.py"):
        (tmp_path / name).write_text("raise SystemExit('mine')\n")
    program = "from mlxquant.measure.corpus import load_corpus; print(load_corpus('builtin').sha256)"
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONHASHSEED": "7"}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == load_corpus("builtin").sha256


def test_missing_modules_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = Path(sysconfig.get_path("stdlib"))
    for name in SOURCES:
        if name not in ("heapq", "json/decoder"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / f"{name}.py").symlink_to(library / f"{name}.py")
    whole = load_corpus("builtin")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    found = load_corpus("builtin")
    assert found.label == f"{whole.label}, without heapq.py, json/decoder.py"
    assert found.sha256 != whole.sha256


def test_a_python_without_documentation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    refused("builtin", SourceError, "came without its documentation")
