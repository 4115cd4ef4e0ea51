"""The plan of a GGUF file: from headers alone, every byte known, every refusal with its next step."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mlxquant.errors import PlanError, SourceError, UnsupportedError
from mlxquant.files.gguf_file import GGUFFile, GGUFTensor
from mlxquant.files.hf_folder import HFFolder
from mlxquant.files.imatrix import Imatrix
from mlxquant.plan.gguf_plan import GGUFPlan, plan_checkpoint, plan_gguf
from mlxquant.plan.gguf_types import type_settings
from tests.families.gguf_checkpoints import make as checkpoint
from tests.gguf_files import write_gguf
from tests.tiny import make

KEYS = {
    "general.architecture": "llama",
    "llama.block_count": np.uint32(2),
    "llama.attention.head_count": np.uint32(4),
    "llama.attention.head_count_kv": np.array([1, 1], np.int32),
}


def tensors(**types: str) -> dict[str, GGUFTensor]:
    """blk.1.ffn_down=... as keyword blk_1_ffn_down; every tensor is 4 x 256."""
    names = {"blk_1_ffn_down": "blk.1.ffn_down.weight", "token_embd": "token_embd.weight", "output": "output.weight",
             "norm": "output_norm.weight", "odd": "blk.0.odd"}  # fmt: skip
    return {names[name]: GGUFTensor((4, 256), kind, 0, 1) for name, kind in types.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("plan") / "m", width=256)


def from_folder(folder: Path, type_name: str = "Q4_K_M", **options: object) -> GGUFPlan:
    opened = HFFolder(folder)
    return plan_checkpoint(opened.config, opened.specs, type_settings(type_name), **options)


def test_bytes_are_the_sum_of_the_tensors(folder):
    plan = from_folder(folder)
    shown = plan.to_json()
    assert plan.nbytes == shown["bytes"] == sum(t["bytes"] for t in shown["tensors"])
    assert sum(plan.bytes_by_type().values()) == plan.nbytes
    assert plan.bpw == pytest.approx(8 * plan.nbytes / plan.size)
    assert {t.type_name for t in plan.tensors} >= {"Q4_K", "Q6_K", "F32"}


def test_the_digest_tells_plans_apart(folder):
    base = from_folder(folder)
    assert from_folder(folder).digest() == base.digest()
    width = next(t.target.shape[-1] for t in base.tensors if t.name == "blk.0.ffn_down.weight")
    entries = {"blk.0.ffn_down.weight": np.ones((1, width), np.float32)}
    with_imatrix = from_folder(folder, imatrix=Imatrix("a", entries, (), 0))
    doubled = {name: entry * np.float32(2) for name, entry in entries.items()}
    others = [
        from_folder(folder, "Q4_K_S"),
        from_folder(folder, "Q4_K"),
        with_imatrix,
        from_folder(folder, imatrix=Imatrix("a", doubled, (), 0)),
        replace(base, metadata=dict(base.metadata) | {"llama.rope.freq_base": np.float32(1)}),
        replace(base, tensors=base.tensors[::-1]),
    ]
    digests = [plan.digest() for plan in [base, *others]]
    assert digests[2] == digests[0]  # an alias
    assert len(set(digests)) == len(digests) - 1
    assert [t.name for t in with_imatrix.tensors if t.importance] == ["blk.0.ffn_down.weight"]


def test_rope_factors_come_with_their_values(folder):
    opened = HFFolder(folder)
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 64}  # fmt: skip
    plan = plan_checkpoint(opened.config | {"rope_scaling": scaling}, opened.specs, type_settings("Q4_K_M"))
    (rope,) = [t for t in plan.tensors if t.values]
    assert (rope.name, rope.type_name) == ("rope_freqs.weight", "F32")
    assert len(rope.values) == rope.size
    assert plan.digest() != from_folder(folder).digest()


def test_what_the_file_cannot_say_is_a_remark(folder):
    opened = HFFolder(folder)
    plan = plan_checkpoint(opened.config | {"hidden_act": "relu"}, opened.specs, type_settings("Q8_0"))
    assert plan.remarks[0] == "hidden_act is 'relu', which GGUF cannot say: llama.cpp takes silu"


def test_mxfp4_checkpoints_stay_mxfp4_unless_asked(tmp_path):
    opened = HFFolder(checkpoint(tmp_path / "m", "gpt_oss-mxfp4"))
    for again in (False, True):
        plan = plan_checkpoint(opened.config, opened.specs, type_settings("Q8_0"), allow_requantize=again)
        kinds = {t.type_name for t in plan.tensors if t.source_type == "MXFP4"}
        assert kinds == ({"Q8_0"} if again else {"MXFP4"})
        assert any("MXFP4 in the source" in remark for remark in plan.remarks) is not again


def test_weights_that_were_rounded_before(folder):
    rounded = {"model.embed_tokens.weight": "4g64"}
    with pytest.raises(PlanError, match="4g64 in the source") as caught:
        from_folder(folder, rounded=rounded)
    assert "--allow-requantize" in str(caught.value.hint)
    assert any("a second time" in r for r in from_folder(folder, rounded=rounded, allow_requantize=True).remarks)
    assert from_folder(folder, "F16", rounded=rounded).remarks  # floats lose nothing


def test_a_scheme_that_is_not_read(folder):
    opened = HFFolder(folder)
    config = opened.config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    with pytest.raises(UnsupportedError, match="already quantized"):
        plan_checkpoint(config, opened.specs, type_settings("Q8_0"))


# -- from GGUF


def test_quantizing_again_must_be_asked_for():
    given = tensors(token_embd="Q8_0", output="F16", blk_1_ffn_down="Q6_K")
    with pytest.raises(PlanError, match=r"token_embd\.weight: Q8_0 in the source") as caught:
        plan_gguf(KEYS, given, type_settings("Q6_K"))
    assert "--allow-requantize" in str(caught.value.hint)
    plan = plan_gguf(KEYS, given, type_settings("Q6_K"), allow_requantize=True)
    assert {t.name: t.copied for t in plan.tensors} == {
        "output.weight": False, "token_embd.weight": False, "blk.1.ffn_down.weight": True}  # fmt: skip


def test_what_llama_quantize_leaves_alone_keeps_its_type():
    given = tensors(token_embd="F16", norm="F16", odd="I32")
    plan = plan_gguf(KEYS, given, type_settings("Q4_K_M"))
    assert {t.name: t.type_name for t in plan.tensors} == {
        "output_norm.weight": "F16", "token_embd.weight": "Q6_K", "blk.0.odd": "I32"}  # fmt: skip


def test_a_type_that_is_not_read_is_not_kept_for_another():
    """llama-quantize stops there, too; a matrix of doubles in a Q4_K_M file is not what was asked for."""
    with pytest.raises(PlanError, match=r"blk\.1\.ffn_down\.weight: F64 in the source, which mlxquant does not read"):
        plan_gguf(KEYS, tensors(token_embd="F16", blk_1_ffn_down="F64"), type_settings("Q4_K_M"), allow_requantize=True)


def test_more_tokens_than_the_embedding_has_rows():
    keys = KEYS | {"tokenizer.ggml.tokens": ["a"] * 99999}
    with pytest.raises(SourceError, match=r"token_embd\.weight: \d+ rows for 99999 tokens"):
        plan_gguf(keys, tensors(token_embd="F16"), type_settings("Q4_K_M"))


def test_file_type_and_split_keys():
    keys = {**KEYS, "general.file_type": np.uint32(1), "split.count": np.uint16(2), "mlxquant.version": "0"}
    metadata = plan_gguf(keys, tensors(token_embd="F16"), type_settings("Q4_K_M")).metadata
    assert metadata["general.file_type"] == np.uint32(15)
    assert not [key for key in metadata if key.startswith(("split.", "mlxquant."))]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"general.architecture": np.uint32(3)}, "general.architecture: found"),
        ({"llama.block_count": "two"}, "block_count: found"),
        ({"llama.block_count": np.array([1, 2], np.int32)}, "block_count: found"),
        ({"llama.attention.head_count": ["a"]}, "head_count: found"),
        ({"llama.expert_count": np.float32(8)}, "expert_count: found"),
    ],
)
def test_keys_that_the_rules_cannot_use(change, says):
    with pytest.raises(SourceError, match=says):
        plan_gguf(KEYS | change, tensors(token_embd="F16"), type_settings("Q4_K_M"))


def test_files_without_weights():
    with pytest.raises(SourceError, match="no weights"):
        plan_gguf(KEYS, {}, type_settings("Q4_K_M"))
    empty = tensors(token_embd="F16") | {"blk.0.none.weight": GGUFTensor((0, 256), "F16", 0, 0)}
    with pytest.raises(SourceError, match="holds nothing"):
        plan_gguf(KEYS, empty, type_settings("Q4_K_M"))


def test_an_imatrix_of_another_model(folder, tmp_path):
    imatrix = Imatrix("wiki.gguf", {"blk.0.attn_k.weight": np.ones((1, 99), np.float32)}, (), 0)
    file = GGUFFile(write_gguf(folder, tmp_path / "m.gguf", "F16"))
    for plan in (
        lambda: from_folder(folder, imatrix=imatrix),
        lambda: plan_gguf(file.typed, file.tensors, type_settings("Q4_K_M"), imatrix=imatrix),
    ):
        with pytest.raises(SourceError, match=r"wiki\.gguf: blk\.0\.attn_k\.weight has 99 values"):
            plan()


def test_planning_loads_nothing_heavy():
    code = "import sys, mlxquant.plan.gguf_plan, mlxquant.convert.block_rows\n"
    code += "print([m for m in ('mlx', 'mlx_lm', 'transformers', 'numba', 'tokenizers', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
