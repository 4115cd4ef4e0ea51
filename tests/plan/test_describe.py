"""What `inspect` says, against what is known by other means: mlx-lm, the gguf package, arithmetic."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import gguf
import pytest
from safetensors import safe_open

from mlxquant.errors import SourceError
from mlxquant.files.gguf_file import GGUFFile
from mlxquant.files.hf_folder import HFFolder
from mlxquant.plan.describe import LEFT_OUT, Description, describe, describe_gguf
from mlxquant.tensors import TensorSpec
from tests import tiny
from tests.gguf_files import write_gguf


def of(folder: Path) -> Description:
    source = HFFolder(folder)
    return describe(source.config, source.specs)


def parameters_in(folder: Path) -> int:
    """The elements that the safetensors library sees."""
    with safe_open(folder / "model.safetensors", "np") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_plain_folder(tmp_path: Path, family: str):
    found = of(tiny.make(tmp_path, family))
    assert found.parameters == parameters_in(tmp_path)
    assert found.bpw == 16
    facts = found.facts
    assert (facts.layers, facts.heads, facts.kv_heads, facts.head_dim) == (2, 4, 2, 32)
    assert (facts.context, facts.vocab, facts.tied) == (2048, tiny.VOCAB, False)
    assert found.by_format().keys() == {"bfloat16"}
    assert "unknown" not in found.by_role()
    assert sum(nbytes for _, _, nbytes in found.by_role().values()) == found.nbytes
    assert found.remarks == ()


def test_a_tied_head_counts_once_even_when_it_is_stored(tmp_path: Path):
    alone = of(tiny.make(tmp_path / "alone", tied=True))
    twice_folder = tiny.make(tmp_path / "twice", tied=False)
    config = json.loads((twice_folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (twice_folder / "config.json").write_text(json.dumps(config))
    twice = of(twice_folder)
    assert twice.parameters == alone.parameters == parameters_in(tmp_path / "alone")
    assert parameters_in(twice_folder) > twice.parameters
    assert twice.by_role()[LEFT_OUT][0] == 1
    assert twice.bpw == alone.bpw == 16


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("source"), "llama")


def converted(model: Path, out: Path, **how: Any) -> Path:
    """By the real mlx_lm.convert."""
    from mlx_lm import convert

    convert(str(model), str(out), quantize=True, **how)
    return out


@pytest.mark.parametrize(
    ("how", "label"),
    [
        ({"q_bits": 4, "q_group_size": 64}, "4g64"),
        ({"q_bits": 3, "q_group_size": 32}, "3g32"),
        ({"q_bits": 6, "q_group_size": 128}, "6g128"),
        ({"q_mode": "mxfp4", "q_bits": 4, "q_group_size": 32}, "mxfp4"),
        ({"q_mode": "nvfp4", "q_bits": 4, "q_group_size": 16}, "nvfp4"),
    ],
)
def test_what_mlx_lm_quantized(model: Path, tmp_path: Path, how: dict[str, Any], label: str):
    source, found = of(model), of(converted(model, tmp_path / "out", **how))
    assert found.parameters == source.parameters
    assert {t.name: t.shape for t in found.tensors} == {t.name: t.shape for t in source.tensors}
    assert {t.name: t.role for t in found.tensors} == {t.name: t.role for t in source.tensors}
    assert {t.format for t in found.tensors if len(t.shape) == 2} == {label}
    stored = HFFolder(tmp_path / "out").specs.values()
    assert found.nbytes == sum(s.nbytes for s in stored)
    assert found.quantization is not None
    assert found.quantization["bits"] == how["q_bits"]


def test_layers_that_differ_are_counted(model: Path, tmp_path: Path):
    def recipe(path: str, module: Any) -> Any:
        higher = "v_proj" in path or "lm_head" in path
        return {"bits": 8, "group_size": 32, "mode": "affine"} if higher else "up_proj" not in path

    found = of(converted(model, tmp_path / "out", q_bits=4, q_group_size=64, quant_predicate=recipe))
    assert found.quantization is not None
    assert found.quantization["overrides"] == 2 + 1  # v_proj and the head; what stays float has no entry
    assert found.by_format()["8g32"][0] == 3
    assert {t.format for t in found.tensors if "up_proj" in t.name} == {"bfloat16"}


def test_packed_weights_that_config_does_not_explain(model: Path, tmp_path: Path):
    out = HFFolder(converted(model, tmp_path / "out", q_bits=4, q_group_size=64))
    block = out.config["quantization"]
    for wrong in (
        None,
        {},
        block | {"bits": 8},
        block | {"group_size": 32},
        block | {"bits": "4"},
        block | {"mode": "x"},
    ):
        config = {k: v for k, v in out.config.items() if k != "quantization_config"} | {"quantization": wrong}
        with pytest.raises(SourceError):
            describe(config, out.specs)


def test_a_family_that_nobody_knows_is_described_as_far_as_it_goes():
    config = {
        "model_type": "newfangled",
        "architectures": ["NewForCausalLM"],
        "num_hidden_layers": 7,
        "num_attention_heads": "x",
    }
    found = describe(config, {"w": TensorSpec("w", (64, 64), "F16")})
    assert (found.architecture, found.facts.layers, found.facts.heads) == ("NewForCausalLM", 7, None)
    assert found.parameters == 4096
    assert found.tensors[0].role is None
    assert "newfangled" in found.remarks[0]


@pytest.mark.parametrize(
    "config", [{}, {"architectures": 3}, {"architectures": [4], "model_type": []}, {"text_config": 9}]
)
def test_a_config_of_nonsense_describes_little_and_fails_never(config: dict[str, Any]):
    found = describe(config, {"w": TensorSpec("w", (64,), "F32")})
    assert found.parameters == 64
    json.dumps(found.to_json(tensors=True))


def test_a_foreign_quantization_is_named(tmp_path: Path):
    folder = HFFolder(tiny.make(tmp_path))
    found = describe(folder.config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}, folder.specs)
    assert found.quantization == {"quant_method": "gptq", "bits": 4}
    assert any("gptq" in remark for remark in found.remarks)


def test_vision_parts_are_named(tmp_path: Path):
    folder = HFFolder(tiny.make(tmp_path))
    assert describe(folder.config | {"vision_config": {"depth": 3}}, folder.specs).modalities == (
        "text",
        "vision",
    )


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_1"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_gguf_file_against_the_gguf_package(tmp_path: Path, kind: str, tied: bool):
    folder = tiny.make(tmp_path / "hf", "llama", tied=tied)
    path = write_gguf(folder, tmp_path / "model.gguf", kind)
    reader = gguf.GGUFReader(path)
    file = GGUFFile(path)
    found = describe_gguf(file.metadata, file.tensors)
    assert found.parameters == sum(int(t.n_elements) for t in reader.tensors) == of(folder).parameters
    assert found.nbytes == sum(int(t.n_bytes) for t in reader.tensors)
    assert {t.name: t.format for t in found.tensors} == {t.name: t.tensor_type.name for t in reader.tensors}
    assert "unknown" not in found.by_role()
    roles, source = found.by_role(), of(folder).by_role()
    assert {r: n for r, (n, _, _) in roles.items()} == {r: n for r, (n, _, _) in source.items()}
    assert found.facts == of(folder).facts


def test_a_gguf_architecture_that_nobody_knows(tmp_path: Path):
    path = write_gguf(tiny.make(tmp_path / "hf"), tmp_path / "model.gguf")
    file = GGUFFile(path)
    metadata = {k.replace("llama.", "new."): v for k, v in file.metadata.items()} | {"general.architecture": "new"}
    found = describe_gguf(metadata, file.tensors)
    assert found.facts.layers == 2
    assert found.facts.heads == 4
    assert "new" in found.remarks[0]
