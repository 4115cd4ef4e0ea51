"""Our GGUF files against what is kept of llama.cpp's (scripts/oracle_files.py): the same keys, types and bytes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.convert import gguf_cases as cases

DOCS = Path(__file__).parents[2] / "docs" / "gguf.md"


@pytest.mark.parametrize("name", cases.CASES)
def test_files_are_llama_cpps(name: str, tmp_path: Path) -> None:
    folder, kept = cases.make(tmp_path / "model" / name, name), cases.kept(name)
    assert kept.keys() == cases.runs(name).keys()
    for wanted, theirs in kept.items():
        ours = cases.summary(cases.ours(folder, tmp_path / "made", name, wanted))
        assert cases.differences(name, wanted, theirs, ours) == [], (name, wanted)


def test_all_kinds_of_tensors_are_among_them() -> None:
    """Each type that we write, experts, widths of every remainder, and every flag."""
    told = [line.split() for name in cases.CASES for made in cases.kept(name).values()
            for line in made["tensors"].values()]  # fmt: skip
    types = {kind for kind, _, _ in told}
    assert types == {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K",
                     "Q6_K", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4"}  # fmt: skip
    assert {len(shape.split("x")) for _, shape, _ in told} == {1, 2, 3}
    widths = {int(shape.split("x")[-1]) for _, shape, _ in told if "x" in shape}
    assert {(width % 256 == 0, width % 32 == 0) for width in widths} == {(True, True), (False, True), (False, False)}
    flags = {flag for name in cases.CASES for run in cases.runs(name).values() for flag in run.flags}
    assert {flag for flag in flags if flag.startswith("--")} == {
        "--pure", "--tensor-type", "--output-tensor-type", "--token-embedding-type", "--allow-requantize",
    }  # fmt: skip


def test_one_changed_byte_key_or_place_is_a_difference() -> None:
    for wanted in ("Q4_K_M", "F16"):
        good = cases.kept("llama")[wanted]
        assert cases.differences("llama", wanted, good, good) == []
        name, line = list(good["tensors"].items())[-1]
        for part, key, value in [
            ("tensors", name, line[:-1] + ("0" if line[-1] != "0" else "1")),
            ("tensors", "blk.9.more.weight", line),
            ("keys", "llama.block_count", ["int32", 4]),
            ("keys", "general.file_type", ["uint32", 99]),
        ]:
            other = good | {part: good[part] | {key: value}}
            assert len(cases.differences("llama", wanted, good, other)) == 1, key
            assert len(cases.differences("llama", wanted, other, good)) == 1, key
    moved = good | {"order": good["order"] | {"tensors": "another"}}
    assert cases.differences("llama", "Q4_K_M", good, moved) == ["tensors stand in another order"]


def test_the_page_lists_every_difference_of_metadata() -> None:
    section = DOCS.read_text("utf-8").split("## Differences from llama.cpp's tools")[1].split("\n## ")[0]
    listed = set(re.findall(r"^- `([\w.*]+)`", section, re.MULTILINE))
    ours = {"mlxquant.*" for key in cases.OURS_ALONE if key.startswith("mlxquant.")}
    assert listed == ours | {cases.NAME_ALONE} | {key for case in cases.CASES.values() for key in case.differs}
