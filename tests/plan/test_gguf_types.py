"""Tensor types against llama-quantize itself: tests/fixtures/gguf_types, written by scripts/oracle_types.py."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from mlxquant.errors import PlanError, UsageError
from mlxquant.files.gguf_file import GGUFFile
from mlxquant.plan import gguf_types
from mlxquant.plan.gguf_types import (
    FILE_TYPES,
    TENSOR_TYPES,
    TypeSettings,
    auto_type,
    float_type,
    order,
    tensor_types,
    type_settings,
)
from tests import oracle, tiny

FIXTURES = sorted((Path(__file__).parent.parent / "fixtures" / "gguf_types").glob("*.json"))
QUANTIZED = [name for name, (_, base) in FILE_TYPES.items() if base not in gguf_types.FLOAT_TYPES]


def expand(pattern: str) -> list[str]:
    """blk.0-2,7.attn_q.weight -> four names."""
    if not (found := re.fullmatch(r"blk\.([\d,-]+)(\..*)", pattern)):
        return [pattern]
    spans = [part.split("-") for part in found[1].split(",")]
    return [f"blk.{layer}{found[2]}" for span in spans for layer in range(int(span[0]), int(span[-1]) + 1)]


def expand_all(patterns: dict[str, Any]) -> dict[str, Any]:
    return {name: value for pattern, value in patterns.items() for name in expand(pattern)}


class Fixture:
    def __init__(self, path: Path) -> None:
        read = json.loads(path.read_text())
        self.metadata, self.runs, self.order_sha256 = read["metadata"], read["runs"], read["order_sha256"]
        self.shapes = {name: tuple(shape) for name, shape in expand_all(read["shapes"]).items()}
        self.kept = {name: kind for kind, patterns in read["kept"].items() for p in patterns for name in expand(p)}

    def types(self, run: dict[str, Any]) -> dict[str, str]:
        """What llama-quantize said of every tensor."""
        rest = next(kind for kind, patterns in run["types"].items() if patterns == "*")
        named = {n: kind for kind, ps in run["types"].items() if ps != "*" for p in ps for n in expand(p)}
        return {name: self.kept.get(name) or named.get(name, rest) for name in self.shapes}


def parse(args: list[str]) -> tuple[TypeSettings, bool]:
    """llama-quantize's command line -> our settings, and whether it had an importance matrix."""
    words, flags = iter(args[:-1]), {"tensor_types": []}
    for word in words:
        match word:
            case "--pure" | "--imatrix":
                flags[word[2:]] = True
            case "--tensor-type":
                flags["tensor_types"].append(next(words))
            case _:
                flags[word[2:].replace("-", "_")] = next(words)
    has_imatrix = flags.pop("imatrix", False)
    return type_settings(args[-1], **flags), has_imatrix


def ours(fixture: Fixture, settings: TypeSettings, has_imatrix: bool) -> dict[str, str]:
    return tensor_types(
        fixture.metadata, fixture.shapes, settings, fixture.shapes.keys() if has_imatrix else None, "F16"
    )[0]


def test_there_are_fixtures():
    assert len(FIXTURES) == 30
    assert sum(len(Fixture(path).runs) for path in FIXTURES) > 650


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_every_type_is_llama_quantizes(path):
    fixture = Fixture(path)
    for run in fixture.runs:
        settings, has_imatrix = parse(run["args"])
        if settings.file_type == "Q2_K_S" and not has_imatrix:
            continue  # a dry run only warns; the run itself stops, as we do
        expected, found = fixture.types(run), ours(fixture, settings, has_imatrix)
        assert found.keys() == expected.keys()
        wrong = {name: (found[name], expected[name]) for name in expected if found[name] != expected[name]}
        assert not wrong, f"{run['args']}: {wrong}"


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_the_order_is_llama_quantizes(path):
    fixture = Fixture(path)
    names = order(reversed(fixture.shapes))
    assert hashlib.sha256("\n".join(names).encode()).hexdigest() == fixture.order_sha256
    assert list(ours(fixture, type_settings("Q4_K_M"), False)) == names


def test_order_counts_in_layers_not_in_letters():
    assert order(["blk.10.a", "output.weight", "blk.9.b", "blk.9.B", "a", "blk.x"]) == [
        "a", "blk.x", "output.weight", "blk.9.B", "blk.9.b", "blk.10.a"
    ]  # fmt: skip


# Gathered by hand from llama-quantize before this code was written: 32 layers, no importance matrix.
M32 = {4, 5, 7, 8, 10, 11, 13, 14, 16, 17, 19, 20, 22, 23, 25, 26}
GOLDEN = {  # file type: attn_v (GQA 4), attn_v (GQA 1), attn_output, ffn_down; a set of layers keeps the base type
    "Q2_K": ("Q4_K", "Q3_K", "Q3_K", "Q3_K"),
    "Q3_K_S": (None, None, None, None),
    "Q3_K_M": ("Q4_K", "Q4_K", "Q4_K", "Q4_K"),
    "Q3_K_L": ("Q5_K", "Q5_K", "Q5_K", "Q5_K"),
    "Q4_0": (None, None, None, None),
    "IQ4_XS": ("Q5_K", None, None, None),
    "IQ4_NL": ("Q5_K", None, None, None),
    "Q4_K_S": (None, None, None, None),
    "Q4_K_M": ("Q6_K", "Q6_K", None, "Q6_K"),
    "Q5_K_S": (None, None, None, None),
    "Q5_K_M": ("Q6_K", "Q6_K", None, "Q6_K"),
    "Q6_K": (None, None, None, None),
    "Q8_0": (None, None, None, None),
}


@pytest.mark.parametrize("file_type", GOLDEN)
@pytest.mark.parametrize(("name", "column"), [("llama-32-gqa4", 0), ("llama-32-gqa1", 1)])
def test_golden_table(file_type, name, column):
    fixture = Fixture(next(path for path in FIXTURES if path.stem == name))
    types = ours(fixture, type_settings(file_type), False)
    base = FILE_TYPES[file_type][1]
    row = GOLDEN[file_type]
    middle = 12  # past the first eighth, and a layer that use_more_bits takes
    assert types["output.weight"] == ("Q8_0" if file_type == "Q8_0" else "Q6_K")
    assert types["token_embd.weight"] == types[f"blk.{middle}.attn_q.weight"] == base
    for part, expected in (("attn_v", row[column]), ("attn_output", row[2]), ("ffn_down", row[3])):
        assert types[f"blk.{middle}.{part}.weight"] == (expected or base), part
    if file_type in ("Q4_K_M", "Q5_K_M"):
        for part in ("attn_v", "ffn_down"):
            assert {i for i in range(32) if types[f"blk.{i}.{part}.weight"] == base} == M32
    first = {"Q3_K_M": (2, "Q5_K"), "IQ4_XS": (4, "Q5_K"), "IQ4_NL": (4, "Q5_K"), "Q4_K_S": (4, "Q5_K")}
    if file_type in first:
        count, kind = first[file_type]
        assert {i for i in range(32) if types[f"blk.{i}.ffn_down.weight"] == kind} == set(range(count))


def test_names_and_numbers_are_ggufs():
    for name, (number, _) in FILE_TYPES.items():
        enum = gguf.LlamaFileType(number).name
        assert enum in (f"MOSTLY_{name}", f"ALL_{name}")
    assert all(hasattr(gguf.GGMLQuantizationType, name) for name in TENSOR_TYPES)
    assert type_settings("q4_k").file_type == "Q4_K_M"
    assert type_settings("bf16").file_type_id == 32


# conversion/base.py, prepare_tensors
F32_TENSORS = """
    FFN_GATE_INP FFN_GATE_INP_SHEXP POS_EMBD TOKEN_TYPES SSM_CONV1D SHORTCONV_CONV TIME_MIX_FIRST TIME_MIX_W1
    TIME_MIX_W2 TIME_MIX_DECAY_W1 TIME_MIX_DECAY_W2 TIME_MIX_LERP_FUSED ALTUP_CORRECT_COEF ALTUP_PREDICT_COEF
    SSM_CONV1D_Q SSM_CONV1D_K SSM_CONV1D_V INDEXER_PROJ
"""


def test_float_types_are_the_converters_for_every_family():
    """tests/fixtures/gguf_floats.json: names, shapes and types of files that convert_hf_to_gguf.py wrote."""
    families = json.loads((FIXTURES[0].parent.parent / "gguf_floats.json").read_text())
    assert families.pop("command")
    assert len(families) > 20
    for family, groups in families.items():
        assert {"F32", "BF16"} == {kind for (kind, *_), _ in groups}
        for (kind, *shape), patterns in groups:
            for name in (name for pattern in patterns for name in expand(pattern)):
                assert float_type(name, tuple(shape), "BF16") == kind, (family, name)


def test_float_types_are_the_converters():
    for key in F32_TENSORS.split():
        name = gguf.TENSOR_NAMES[gguf.MODEL_TENSOR[key]].format(bid=11) + ".weight"
        assert float_type(name, (8, 8), "BF16") == "F32", name
    for name in ("blk.3.attn_q.weight", "output.weight", "blk.0.altup_router.weight", "blk.0.ffn_gate_exps.weight"):
        assert float_type(name, (8, 8), "F16") == "F16"
        assert float_type(name, (8,), "F16") == "F32"
    assert float_type("blk.0.attn_q_norm.weight", (4, 8), "F16") == "F32"
    assert float_type("blk.0.ffn_gate_exps.bias", (4, 8), "F16") == "F32"
    assert [auto_type(code) for code in ("BF16", "F16", "F32")] == ["BF16", "F16", "F16"]


def test_float_files_leave_no_tensor_quantized():
    fixture = Fixture(next(path for path in FIXTURES if path.stem == "gemma3n"))
    for name in ("F32", "F16", "BF16"):
        types = ours(fixture, type_settings(name), False)
        assert set(types.values()) == {"F32", name}
    assert types["blk.0.laurel_l.weight"] == "BF16"


def test_what_is_not_quantized_has_the_sources_dtype():
    fixture = Fixture(next(path for path in FIXTURES if path.stem == "gemma3n"))
    for source, expected in (("BF16", "BF16"), ("F16", "F16"), ("F32", "F16")):
        types, _ = tensor_types(fixture.metadata, fixture.shapes, type_settings("Q4_K_M"), None, source)
        assert types["blk.0.laurel_l.weight"] == expected
        assert types["blk.0.attn_norm.weight"] == "F32"


METADATA = {"general.architecture": "llama", "llama.block_count": np.uint32(2), "llama.attention.head_count": 4}
SHAPES = {
    "output.weight": (64, 512),
    "token_embd.weight": (64, 512),
    "blk.0.attn_q.weight": (512, 512),
    "blk.0.ffn_up.weight": (512, 288),
    "blk.0.ffn_down.weight": (512, 288),
    "blk.1.ffn_down.weight": (512, 288),
    "blk.1.attn_norm.weight": (512,),
}


def test_remarks_name_width_and_types():
    types, remarks = tensor_types(METADATA, SHAPES, type_settings("Q4_K_S"))
    assert types["blk.0.ffn_up.weight"] == "Q5_0"
    assert remarks == ("blk.0.ffn_down.weight and 2 more: width 288 is not a multiple of 256: Q4_K becomes Q5_0",)


def test_missing_entries_are_remarked_but_not_of_embeddings_and_head():
    entries = {"blk.0.attn_q.weight", "blk.0.ffn_up.weight", "blk.0.ffn_down.weight"}
    _, remarks = tensor_types(METADATA, SHAPES, type_settings("Q4_0"), entries)
    assert remarks == ("blk.1.ffn_down.weight: no entry in the importance matrix, quantized without",)
    assert tensor_types(METADATA, SHAPES, type_settings("Q8_0"), entries)[1] == ()


def test_q2_k_s_needs_importance_for_each_of_its_tensors():
    for names, first in ((None, "blk.0.attn_q.weight"), ({"blk.0.attn_q.weight"}, None)):
        if first:
            with pytest.raises(PlanError, match=f"needs an importance matrix: {first}"):
                tensor_types(METADATA, SHAPES, type_settings("Q2_K_S"), names)
        else:  # the others have widths that Q2_K cannot hold
            assert tensor_types(METADATA, SHAPES, type_settings("Q2_K_S"), names)[0]["blk.0.attn_q.weight"] == "Q2_K"
    assert tensor_types(METADATA, SHAPES, type_settings("Q2_K"))[0]["blk.0.attn_q.weight"] == "Q2_K"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"file_type": "Q4_K_XL"}, "'Q4_K_XL' is unknown"),
        ({"file_type": "IQ2_M"}, "unknown"),
        ({"file_type": "Q4_K_M", "tensor_types": ["ffn_down"]}, "has no '='"),
        ({"file_type": "Q4_K_M", "tensor_types": ["=q8_0"]}, "has no '='"),
        ({"file_type": "Q4_K_M", "tensor_types": ["ffn=Q4_K_M"]}, "'Q4_K_M' is no type of a tensor"),
        ({"file_type": "Q4_K_M", "tensor_types": ["ffn[=q8_0"]}, "no regular expression"),
        ({"file_type": "Q4_K_M", "tensor_types": ["(" * 9999 + ")" * 9999 + "=q8_0"]}, "no regular expression"),
        ({"file_type": "Q4_K_M", "tensor_types": [f"a{{{10**20}}}=q8_0"]}, "no regular expression"),
        ({"file_type": "Q4_K_M", "tensor_types": [r"ffn_\Sown=q8_0"]}, "lower-cased"),
        ({"file_type": "Q4_K_M", "output_tensor_type": "q9"}, "--output-tensor-type 'q9'"),
        ({"file_type": "Q4_K_M", "token_embedding_type": ""}, "--token-embedding-type ''"),
        ({"file_type": "F16", "tensor_types": ["ffn=q8_0"]}, "no mixture"),
    ],
)
def test_words_that_mean_nothing_are_refused(words, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        type_settings(**words)


def test_an_override_must_decide_something():
    for pattern in ("attn_z", "attn_norm"):
        with pytest.raises(UsageError, match=f"{pattern}=Q8_0 matches none of the 6"):
            tensor_types(METADATA, SHAPES, type_settings("Q4_K_M", tensor_types=[f"{pattern}=q8_0"]))


def test_a_type_asked_for_by_name_must_hold_the_width():
    shapes = {**SHAPES, "output.weight": (64, 288)}
    with pytest.raises(PlanError, match=r"output\.weight: width 288 is no multiple of 256, which Q6_K"):
        tensor_types(METADATA, shapes, type_settings("Q4_K_M", output_tensor_type="q6_k"))


def test_metadata_must_tell_the_layers():
    with pytest.raises(PlanError, match=r"llama\.block_count"):
        tensor_types({"general.architecture": "llama"}, SHAPES, type_settings("Q4_K_M"))
    moe = {**METADATA, "llama.expert_count": 4, "llama.block_count": 1}
    with pytest.raises(PlanError, match=r"blk\.1\.ffn_down\.weight: its name gives no layer below 1"):
        tensor_types(moe, SHAPES, type_settings("Q4_K_M"))


@pytest.mark.oracle
@pytest.mark.parametrize(("dtype", "expected"), [("bfloat16", "BF16"), ("float16", "F16"), ("float32", "F16")])
def test_auto_is_the_converters(tmp_path, dtype, expected):
    """And the whole way, from a checkpoint over the converter's file to llama-quantize's, types and order are ours."""
    made, quantized = tmp_path / "made.gguf", tmp_path / "quantized.gguf"
    oracle.convert(tiny.make(tmp_path / "tiny", dtype=dtype), made, "auto", pre="gpt-2")
    file = GGUFFile(made)
    assert auto_type({"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[dtype]) == expected
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    types, _ = tensor_types(file.metadata, shapes, type_settings(expected))
    assert types == {name: tensor.type_name for name, tensor in file.tensors.items()}
    oracle.quantize(made, quantized, "Q5_K_M")
    types, _ = tensor_types(file.metadata, shapes, type_settings("Q5_K_M"))
    assert list(types.items()) == [(name, t.type_name) for name, t in GGUFFile(quantized).tensors.items()]


def test_these_tests_can_fail(monkeypatch):
    """Another third of the layers, and the fixtures say so."""
    from mlxquant.plan import gguf_mixtures

    monkeypatch.setattr(gguf_mixtures, "more_bits", lambda i, n: i % 3 == 0)
    with pytest.raises(AssertionError, match="attn_v"):
        test_every_type_is_llama_quantizes(next(path for path in FIXTURES if path.stem == "llama-32-gqa4"))
