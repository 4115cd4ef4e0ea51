"""Layouts of GGUF files against llama.cpp's own converter (tests/fixtures/gguf_layout, made by
scripts/oracle_layout.py), and back."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import gguf
import numpy as np
import pytest

from mlxquant.convert.gather import chunks, mxfp4_rows, rows, wide_rows
from mlxquant.convert.gguf_source import Blocks
from mlxquant.errors import SourceError, UnsupportedError
from mlxquant.families.gguf_table import ARCHS, MODEL_TYPES, gguf_name, order
from mlxquant.families.gguf_tensors import gguf_layout, hf_tensors
from mlxquant.families.layout import Piece, Target
from mlxquant.families.mlx_modules import FAMILIES
from mlxquant.files.gguf_file import GGUFFile
from mlxquant.files.hf_folder import HFFolder
from mlxquant.tensors import TensorSpec
from tests.families.gguf_checkpoints import TIED, TOKENS, VARIANTS, make

FIXTURES = Path(__file__).parent.parent / "fixtures" / "gguf_layout"
_HOME = TemporaryDirectory(prefix="mlxquant-gguf-")


@cache
def folder(variant: str) -> Path:
    return make(Path(_HOME.name) / variant, variant)


@cache
def source(variant: str) -> HFFolder:
    return HFFolder(folder(variant))


def expected(variant: str) -> dict[str, dict]:
    return json.loads((FIXTURES / f"{variant}.json").read_text())["tensors"]


def assembled(source, target: Target, chunk_bytes: int = 3000) -> np.ndarray:
    """Chunk by chunk, as a file is written."""
    parts = [wide_rows(source, target, *chunk) for chunk in chunks(target, chunk_bytes)]
    return np.concatenate(parts).reshape(target.shape)


def plain(source, name: str) -> np.ndarray:
    """A source's tensor as float32 rows."""
    spec = source.specs[name]
    return wide_rows(source, Target(name, spec.shape, spec.dtype, (Piece(name, 0, spec.rows),)), 0, spec.rows)


def ulps(a: np.ndarray, b: np.ndarray) -> int:
    bits = [x.astype(np.float32).view(np.int32).astype(np.int64) for x in (a, b)]
    return int(np.abs(bits[0] - bits[1]).max())


@pytest.mark.parametrize("variant", VARIANTS)
def test_names_shapes_and_values_are_those_of_llama_cpp_s_converter(variant: str) -> None:
    opened = source(variant)
    made = gguf_layout(opened.config, opened.specs, TOKENS.get(variant))
    theirs = expected(variant)
    assert {t.name: list(t.shape) for t in made.targets} == {n: t["shape"] for n, t in theirs.items()}
    for target in made.targets:
        if target.change == "mxfp4":
            last = math.prod(target.shape[:-1])
            raw = np.concatenate([mxfp4_rows(opened, target, a, min(a + 7, last)) for a in range(0, last, 7)])
            assert theirs[target.name]["type"] == "MXFP4"
            blocks = raw.reshape(-1, 17)
            floats = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.MXFP4)
            assert np.array_equal(assembled(opened, target).ravel(), floats.ravel()), target.name
        else:
            raw = assembled(opened, target)
            assert raw.dtype == np.float32
        if "values" in theirs[target.name]:
            assert ulps(raw, np.array(theirs[target.name]["values"])) <= 1, target.name
        else:
            assert hashlib.sha256(raw.tobytes()).hexdigest() == theirs[target.name]["sha256"], target.name


@pytest.mark.parametrize("variant", VARIANTS)
def test_everything_is_used_or_dropped_with_a_reason(variant: str) -> None:
    opened = source(variant)
    made = gguf_layout(opened.config, opened.specs)
    used = {piece.source for target in made.targets for piece in target.pieces}
    dropped = dict(made.dropped)
    assert used | dropped.keys() == opened.specs.keys()
    assert not used & dropped.keys()
    assert all(dropped.values())
    more = opened.specs | {"model.layers.0.extra.weight": TensorSpec("model.layers.0.extra.weight", (4,), "BF16")}
    with pytest.raises(UnsupportedError, match=r"model\.layers\.0\.extra\.weight"):
        gguf_layout(opened.config, more)


def test_order_is_llama_quantize_s() -> None:
    names = ["blk.10.a", "blk.2.b", "output.weight", "blk.2.a", "token_embd.weight", "output_norm.weight", "blk.x.a"]
    assert sorted(names, key=order) == [
        "blk.x.a", "output.weight", "output_norm.weight", "token_embd.weight", "blk.2.a", "blk.2.b", "blk.10.a",
    ]  # fmt: skip
    opened = source("qwen2_moe")
    names = [t.name for t in gguf_layout(opened.config, opened.specs).targets]
    assert names == sorted(names, key=order)
    assert names[0] == "output.weight"


class Arrays:
    """Float32 tensors by name, as a source."""

    path, config = Path("arrays"), {}

    def __init__(self, tensors: dict[str, np.ndarray]) -> None:
        self.tensors = tensors
        self.specs = {name: TensorSpec(name, value.shape, "F32") for name, value in tensors.items()}

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        value = self.tensors[name]
        return value.reshape(-1, value.shape[-1] if value.ndim else 1)[start:stop]


def keys(config: dict) -> dict:
    """The keys that tensors are sized by, as the converter writes them."""
    text = config.get("text_config", config)
    special = {"mistral": "llama", "mixtral": "llama", "gemma3_text": "gemma3", "gpt_oss": "gpt-oss"}
    arch = special.get(config["model_type"], config["model_type"].replace("_", ""))
    heads = text["num_attention_heads"]
    own = {
        "block_count": text["num_hidden_layers"],
        "embedding_length": text["hidden_size"],
        "feed_forward_length": text["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": text["num_key_value_heads"],
        "attention.key_length": text.get("head_dim", text["hidden_size"] // heads),
        "expert_count": text.get("num_experts", text.get("num_local_experts")),
        "expert_feed_forward_length": text["intermediate_size" if arch == "gpt-oss" else "moe_intermediate_size"]
        if arch in ("gpt-oss", "qwen2moe", "qwen3moe", "qwen3next")
        else None,
        "expert_shared_feed_forward_length": text.get("shared_expert_intermediate_size"),
    }
    if arch == "qwen3next":
        own |= {
            "ssm.conv_kernel": text["linear_conv_kernel_dim"],
            "ssm.state_size": text["linear_key_head_dim"],
            "ssm.group_count": text["linear_num_key_heads"],
            "ssm.time_step_rank": text["linear_num_value_heads"],
            "ssm.inner_size": text["linear_value_head_dim"] * text["linear_num_value_heads"],
        }
    return {"general.architecture": arch} | {f"{arch}.{k}": v for k, v in own.items() if v is not None}


@cache
def gguf_of(variant: str) -> tuple[dict, Blocks]:
    """(keys, the decoded tensors) of a real file of what a checkpoint makes: F32, and MXFP4 where it was that."""
    opened = source(variant)
    metadata, path = keys(opened.config), Path(_HOME.name) / f"{variant}.gguf"
    writer = gguf.GGUFWriter(path, metadata["general.architecture"])
    for key, value in metadata.items():
        if not key.startswith("general."):
            writer.add_uint32(key, value)
    for target in gguf_layout(opened.config, opened.specs).targets:
        if target.change == "mxfp4":
            raw = mxfp4_rows(opened, target, 0, math.prod(target.shape[:-1])).reshape(*target.shape[:-1], -1)
            writer.add_tensor(target.name, raw, raw_dtype=gguf.GGMLQuantizationType.MXFP4)
        else:
            writer.add_tensor(target.name, assembled(opened, target))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(path)
    return file.metadata, Blocks(file)


def shapes(file: Blocks) -> dict[str, tuple[int, ...]]:
    return {name: spec.shape for name, spec in file.specs.items()}


@pytest.mark.parametrize("variant", [v for v in VARIANTS if not v.startswith("gemma3_text-")])
def test_back_from_gguf_to_the_same_model(variant: str) -> None:
    """What comes back makes the same GGUF file again, and is what the checkpoint held where names are the same."""
    metadata, file = gguf_of(variant)
    back = hf_tensors(metadata, shapes(file))
    opened, again = source(variant), Arrays({name: assembled(file, target, 2000) for name, target in back.items()})
    config = opened.config
    if config["model_type"] == "gemma3":  # a file's model is the text part alone
        config = config["text_config"] | {"model_type": "gemma3_text", "vocab_size": config["vocab_size"]}
    second = gguf_layout(config, again.specs)
    assert not second.dropped
    assert {t.name for t in second.targets} == file.specs.keys()
    for target in second.targets:
        got, want = assembled(again, target), plain(file, target.name).reshape(target.shape)
        if target.change == "neg_exp":
            assert ulps(got, want) <= 2
        else:
            assert np.array_equal(got, want), target.name
    at = "language_model." if variant == "gemma3" else ""
    same = [name for name in back if at + name in opened.specs]
    assert len(same) >= 9
    for name in same:
        want = plain(opened, at + name)
        got = again.tensors[name].reshape(want.shape)
        if variant == "qwen3_next" and name.endswith("norm.weight") and ".linear_attn." not in name:
            want = want + np.float32(1)  # as MLX keeps them
        if name.endswith("norm.weight"):  # w survives 1 + w to float32's rounding around 1
            np.testing.assert_allclose(got, want, rtol=0, atol=2**-24)
        elif name.endswith("A_log"):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
        else:
            assert np.array_equal(got, want), name


@pytest.mark.parametrize("variant", [v for v in VARIANTS if not v.endswith(("-mxfp4", "-fused", "-trimmed"))])
def test_an_mlx_folder_makes_the_same_file(variant: str) -> None:
    """Stock mlx-lm's own `sanitize` on the checkpoint: experts stacked, norms shifted, axes moved."""
    import mlx.core as mx
    from mlx_lm.utils import _get_classes

    opened = source(variant)
    config = json.loads((folder(variant) / "config.json").read_text())
    model_class, args_class = _get_classes(config)
    weights = {}
    for name, spec in opened.specs.items():
        weights[name] = mx.array(plain(opened, name).reshape(spec.shape))
    if variant == "gpt_oss":  # mlx-lm reads no float checkpoint of this family: what its sanitize would want
        weights = unfused_gpt_oss(weights)
    with mx.stream(mx.cpu):
        model = model_class(args_class.from_dict(config))
        if hasattr(model, "sanitize"):
            weights = model.sanitize(weights)
    clean = {n: np.array(v) for n, v in weights.items()}
    folder_made = Arrays(clean)
    made = gguf_layout(config, folder_made.specs)
    reference = gguf_layout(opened.config, opened.specs)
    assert [t.name for t in made.targets] == [t.name for t in reference.targets]
    for ours, theirs in zip(made.targets, reference.targets, strict=True):
        assert ours.shape == theirs.shape
        assert np.array_equal(assembled(folder_made, ours), assembled(opened, theirs)), ours.name


def unfused_gpt_oss(weights):
    made = {}
    for name, value in weights.items():
        if name.endswith("gate_up_proj"):
            for part, one in enumerate(("gate", "up")):
                made[name.replace("gate_up_proj", f"{one}_proj.weight")] = value.swapaxes(-1, -2)[:, part::2]
        elif name.endswith("gate_up_proj_bias"):
            for part, one in enumerate(("gate", "up")):
                made[name.replace("gate_up_proj_bias", f"{one}_proj.bias")] = value[:, part::2]
        elif name.endswith("experts.down_proj"):
            made[f"{name}.weight"] = value.swapaxes(-1, -2)
        else:
            made[name.replace("down_proj_bias", "down_proj.bias")] = value
    return made


def test_an_unknown_family_is_refused_by_name() -> None:
    opened = source("llama")
    for model_type in ("mamba2", "xverse", "nonsense", None):
        with pytest.raises(UnsupportedError, match=rf"model_type '?{model_type}'? ") as refused:
            gguf_layout(opened.config | {"model_type": model_type}, opened.specs)
        assert re.fullmatch("known are gemma, .*smollm3.*", refused.value.hint or "")
    assert {"llama", "mistral", "mixtral", "gpt_oss", "qwen3_next"} <= set(MODEL_TYPES)


def test_dense_layers_that_llama_cpp_does_not_know_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"layers\.3\.mlp\.up_proj\.weight: llama\.cpp has no .*qwen3moe"):
        gguf_name(ARCHS["qwen3_moe"], "model.layers.3.mlp.up_proj.weight")


@pytest.mark.parametrize("module", ARCHS)
def test_names_are_those_of_gguf_s_own_map(module: str) -> None:
    """Every tensor that a family's MLX model may have, also those that no tiny checkpoint has."""
    arch = ARCHS[module]
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == arch.name)
    names = gguf.get_tensor_name_map(number, 8)
    spellings = {"switch_mlp": "experts", "self_attn.sinks": "self_attn.sinks.weight", "dt_bias": "dt_proj.bias"}
    family = FAMILIES[module]
    for name in [row.name for row in family.root] + [f"model.layers.7.{row.name}" for row in family.layer]:
        if name.endswith("in_proj_qkvz.weight"):  # two tensors there
            continue
        theirs = name.removeprefix("language_model.").replace("block_sparse_moe.switch", "mlp.switch")
        for ours, spelling in spellings.items():
            theirs = theirs.replace(ours, spelling)
        if (found := names.get_name(theirs, try_suffixes=(".weight", ".bias"))) is None:
            with pytest.raises(UnsupportedError, match="no such tensor"):
                gguf_name(arch, name)
        else:
            assert gguf_name(arch, name) == found


def test_a_tied_head_is_left_out_with_its_reason() -> None:
    opened = source("qwen2")
    assert "qwen2" in TIED
    head = TensorSpec("lm_head.weight", opened.specs["model.embed_tokens.weight"].shape, "BF16")
    made = gguf_layout(opened.config, opened.specs | {head.name: head})
    assert "output.weight" not in {t.name for t in made.targets}
    assert dict(made.dropped)["lm_head.weight"].startswith("tied")


def test_fused_experts_that_cannot_be_split_are_refused() -> None:
    opened = source("gpt_oss")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    odd = opened.specs | {name: TensorSpec(name, (4, 64, 255), "BF16")}
    with pytest.raises(SourceError, match=r"gate_up_proj is \[4, 64, 255\], expected .* an even number"):
        gguf_layout(opened.config, odd)
    both = opened.specs | {(n := f"{name.replace('gate_up', 'up')}.weight"): TensorSpec(n, (4, 128, 64), "BF16")}
    with pytest.raises(SourceError, match="are both in the source"):
        gguf_layout(opened.config, both)
    packed = source("gpt_oss-mxfp4")
    lost = {n: s for n, s in packed.specs.items() if not n.endswith("0.mlp.experts.down_proj_scales")}
    with pytest.raises(SourceError, match=r"down_proj_scales .*expected \[4, 64, 4\] U8"):
        gguf_layout(packed.config, lost)


def test_a_file_written_by_llama_quantize_drops_axes_of_one() -> None:
    metadata, file = gguf_of("qwen2_moe")
    found = shapes(file)
    assert found["blk.0.ffn_gate_inp_shexp.weight"] == (1, 64)
    found["blk.0.ffn_gate_inp_shexp.weight"] = (64,)
    target = hf_tensors(metadata, found)["model.layers.0.mlp.shared_expert_gate.weight"]
    assert target.shape == (1, 64)


def test_a_tensor_too_many_too_few_or_too_large_is_named() -> None:
    metadata, file = gguf_of("qwen3_next")
    found = shapes(file)
    with pytest.raises(UnsupportedError, match=r"'blk\.2\.ffn_up\.weight' \(1 in all\) has no place"):
        hf_tensors(metadata, found | {"blk.2.ffn_up.weight": (128, 64)})
    with pytest.raises(SourceError, match=r"blk\.0\.attn_gate\.weight: shape \(129, 64\), expected \(128, 64\)"):
        hf_tensors(metadata, found | {"blk.0.attn_gate.weight": (129, 64)})
    with pytest.raises(SourceError, match=r"blk\.1\.attn_k\.weight is missing"):
        hf_tensors(metadata, {k: v for k, v in found.items() if k != "blk.1.attn_k.weight"})
    with pytest.raises(SourceError, match=r"no multiple of its 3 key heads"):
        hf_tensors(metadata | {"qwen3next.ssm.group_count": 3}, found)
    # A block that predicts further tokens, which mlx-lm does not run.
    more = metadata | {"qwen3next.block_count": 3, "qwen3next.nextn_predict_layers": 1}
    assert hf_tensors(more, found | {"blk.2.nextn.eh_proj.weight": (64, 128)}) == hf_tensors(metadata, found)


@pytest.mark.parametrize("variant", ["llama-biases", "gpt_oss", "gpt_oss-mxfp4", "qwen3_next"])
def test_any_range_of_rows_reads_as_it_lies_in_the_whole(variant: str) -> None:
    opened = source(variant)
    rng = np.random.default_rng(1)
    for target in gguf_layout(opened.config, opened.specs).targets:
        count = TensorSpec(target.name, target.shape, target.dtype).rows
        whole = assembled(opened, target, 10**9).reshape(count, -1)
        for _ in range(3):
            start, stop = sorted(rng.integers(0, count + 1, 2).tolist())
            if start < stop:
                assert np.array_equal(wide_rows(opened, target, start, stop), whole[start:stop]), target.name


@pytest.mark.oracle
def test_the_fixtures_are_what_llama_cpp_s_converter_says(tmp_path: Path) -> None:
    import sys

    sys.path.insert(0, str(Path(__file__).parent.parent.parent / "scripts"))
    import oracle_layout

    if "MLXQUANT_LLAMA_CPP" not in os.environ:
        pytest.skip("MLXQUANT_LLAMA_CPP is not set")
    for variant in ("llama", "qwen3_next", "gpt_oss-mxfp4"):
        out = tmp_path / f"{variant}.gguf"
        oracle_layout.convert(folder(variant), out, *oracle_layout.OPTIONS.get(variant, ()))
        found, kept = oracle_layout.tensors(out), expected(variant)
        assert found.keys() == kept.keys()
        assert all("values" in kept[name] or found[name] == kept[name] for name in found)


def test_rows_in_the_source_s_own_dtype_are_the_same_numbers() -> None:
    """`rows`, for MLX folders: what wide_rows gives, rounded to the dtype of the checkpoint."""
    opened = source("gemma2")
    target = next(t for t in gguf_layout(opened.config, opened.specs).targets if t.change == "add_one")
    import ml_dtypes

    raw = rows(opened, target, 0, 1)
    assert raw.dtype == np.uint16
    assert np.array_equal(raw.view(ml_dtypes.bfloat16), wide_rows(opened, target, 0, 1).astype(ml_dtypes.bfloat16))
