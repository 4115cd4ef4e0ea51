"""GGUF keys against what convert_hf_to_gguf.py wrote for the same configs (tests/fixtures/gguf_keys/*.json, which
scripts/oracle_keys.py made), and back: stock mlx-lm reads the same model from a file's keys as from config.json."""

from __future__ import annotations

import json
import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from mlxquant.errors import SourceError, UnsupportedError
from mlxquant.families.gguf import hf_config
from mlxquant.families.gguf_general import count_parameters, general_keys, model_card
from mlxquant.families.gguf_hparams import DEFAULTS
from mlxquant.families.gguf_keys import architecture, file_keys, model_keys, quantized_keys
from mlxquant.families.gguf_limits import unsaid
from mlxquant.families.gguf_rope import rope_tensors
from mlxquant.families.mlx_config import mlx_config

FIXTURES = Path(__file__).parents[1] / "fixtures" / "gguf_keys"
PAGES = {page.stem: json.loads(page.read_text())["cases"] for page in sorted(FIXTURES.glob("*.json"))}
CASES = {f"{family}-{name}": case for family, page in PAGES.items() for name, case in page.items()}
FIRST = {family: next(iter(page.values()))["config"] for family, page in PAGES.items()}
# Where the script is wrong: transformers takes the entry out and it writes 4, whatever the layers are.
ON_PURPOSE = {"qwen3_next-tiny": {"qwen3next.full_attention_interval": 2}}

every_case = pytest.mark.parametrize("name", CASES)


def made(case: dict[str, Any]) -> dict[str, Any]:
    sidecars = {name: text.encode() for name, text in case["files"].items()}
    shapes = {name: tuple(shape) for name, shape in case["shapes"].items()}
    return file_keys(case["config"], sidecars, case["folder"], shapes, file_type=0)


def spelled(key: str, value: Any) -> list[Any]:
    """As scripts/oracle_keys.py spells GGUF types."""
    if isinstance(value, list):
        return [key, f"array of {_type(value[0])}", value]
    return [key, _type(value), value.item() if isinstance(value, np.generic) else value]


def _type(value: Any) -> str:
    return {str: "string", bool: "bool"}.get(type(value)) or str(value.dtype)


@every_case
def test_keys_types_and_order_are_the_script_s(name: str) -> None:
    wanted = CASES[name]["keys"]
    expected = [
        [key, kind, np.float32(value).item() if kind == "float32" else ON_PURPOSE.get(name, {}).get(key, value)]
        for key, kind, value in wanted
    ]
    assert [spelled(key, value) for key, value in made(CASES[name]).items()] == expected


@every_case
def test_rope_tensors_are_bit_equal(name: str) -> None:
    expected = {n: np.frombuffer(bytes.fromhex(text), "<f4") for n, text in CASES[name]["rope"].items()}
    found = rope_tensors(CASES[name]["config"])
    assert found.keys() == expected.keys()
    for tensor, values in found.items():
        bits = values.view(np.int32) - expected[tensor].view(np.int32)
        assert values.dtype == np.float32
        # An odd theta: torch's vectorized powers are not rounded to the nearest (gguf_rope.py).
        assert np.abs(bits).max() <= (1 if name == "llama-llama3, factor 4, heads of 80" else 0)


def test_every_family_is_covered() -> None:
    from mlxquant.families.gguf_table import ARCHS, MODEL_TYPES

    assert set(PAGES) >= set(ARCHS)
    assert set(PAGES) >= set(MODEL_TYPES) - {"iquestcoder"}


@pytest.mark.parametrize("model_type", DEFAULTS)
def test_defaults_are_those_of_transformers(model_type: str) -> None:
    """Catches an upgrade of transformers that moves one; the fixtures say what reaches the keys."""
    import dataclasses

    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    fields = {f.name: f.default for f in dataclasses.fields(CONFIG_MAPPING[model_type])}
    assert DEFAULTS[model_type] == {key: fields[key] for key in DEFAULTS[model_type]}


# --- and back ---

# Refused on the way back, with what says why.
REFUSED = {
    "mixtral-with a head_dim": "32 heads of 64 beside a hidden size of 4096",
    "qwen2-with a head_dim": "12 heads of 64 beside a hidden size of 1536",
    "gemma3_text-a cap on the logits": "final_logit_softcapping in a gemma3 model",
    "llama-llama3, other frequency factors": "no known Llama 3 rope scaling",
}
# Silent about what stock mlx-lm takes otherwise than transformers, or spelled as it cannot read.
NO_COMPARISON = {
    "gemma3-tiny", "gemma3_text-tiny", "llama-Llama 1, which names no key heads",
    "phi3-rope_parameters of transformers 5", *(name for name in CASES if name.endswith("-silent")),
}  # fmt: skip


def back(case: dict[str, Any]) -> dict[str, Any]:
    """hf_config of the file that these keys and the model's tensors make."""
    config = mlx_config(case["config"])
    config |= config.get("text_config", {})
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (config.get("vocab_size", 262208), 1)}
    tied = config["model_type"].startswith("gemma") or config["model_type"] == "smollm3"
    if not config.get("tie_word_embeddings", tied):
        shapes["output.weight"] = (1, 1)
    if config.get("attention_bias"):
        shapes["blk.0.attn_q.bias"] = (1,)
    if config.get("mlp_bias"):
        shapes["blk.0.ffn_up.bias"] = (1,)
    rope = rope_tensors(case["config"])
    shapes |= {name: values.shape for name, values in rope.items()}
    factors = [values.tolist() for name, values in rope.items() if "factors" in name]
    freqs = rope.get("rope_freqs.weight")
    keys = {key: value.item() if isinstance(value, np.generic) else value for key, value in made(case).items()}
    return hf_config(
        keys, shapes, None if freqs is None else freqs.tolist(), (factors[0], factors[1]) if factors else None
    )


def arguments(config: dict[str, Any]) -> dict[str, Any]:
    """Stock mlx-lm's ModelArgs, those that its forward looks at, rope scaling spelled in one way."""
    import dataclasses
    import importlib

    config = mlx_config({key: value for key, value in config.items() if value is not None})
    if config["model_type"] == "gemma3":  # its text part under another name
        config = config["text_config"] | {"model_type": "gemma3_text", "vocab_size": config.get("vocab_size", 262208)}
        config = {"num_attention_heads": 8, "num_key_value_heads": 4} | config
    config["model_type"] = {"mistral": "llama"}.get(config["model_type"], config["model_type"])
    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    args = dataclasses.asdict(module.ModelArgs.from_dict(config))
    args["rope_scaling"] = scaling(args.get("rope_scaling") or {}, args.get("max_position_embeddings"))
    if config["model_type"] in ("llama", "smollm3", "olmo2") and args["head_dim"] is None:
        args["head_dim"] = args["hidden_size"] // args["num_attention_heads"]
    if "sliding_attention" not in (args.get("layer_types") or ()):
        args.pop("sliding_window" if config["model_type"] in ("llama", "smollm3") else "", None)
    if args.get("sliding_window_pattern") == 1:
        del args["sliding_window"]
    unused = ["max_position_embeddings"] if config["model_type"] == "gemma3_text" else []
    for ignored in ("no_rope_layer_interval", "rope_parameters", "layer_types", *unused):
        args.pop(ignored, None)
    return args | {"layer_types": config.get("layer_types")} if config["model_type"] == "gpt_oss" else args


def scaling(rope: dict[str, Any], context: int | None) -> dict[str, Any]:
    kind = rope.get("type") or rope.get("rope_type", "default")
    settings = {
        "default": {}, "dynamic": {},
        "linear": {"factor": 1.0},
        "llama3": {"factor": 1.0, "low_freq_factor": 0, "high_freq_factor": 0,
                   "original_max_position_embeddings": context},
        "yarn": {"factor": 1.0, "original_max_position_embeddings": context, "beta_fast": 32, "beta_slow": 1},
        "longrope": {"long_factor": 0, "short_factor": 0},
        "su": {"long_factor": 0, "short_factor": 0},
    }  # fmt: skip
    found = {name: rope.get(name, default) for name, default in settings[kind.lower()].items()}
    found = {n: np.float32(v).tolist() for n, v in found.items()}
    return {"kind": {"su": "longrope", "dynamic": "default"}.get(kind, kind.lower()), **found}


@pytest.mark.parametrize("name", sorted(CASES.keys() - NO_COMPARISON - REFUSED.keys()))
def test_stock_mlx_lm_reads_the_same_model_back(name: str) -> None:
    case = CASES[name]
    before, after = arguments(dict(case["config"])), arguments(back(case))
    different = {key for key in before if before[key] != after[key] and not _close(before[key], after[key])}
    named = {line.split()[0] for line in unsaid(case["config"])}
    assert different <= named, {key: (before[key], after[key]) for key in different}


@pytest.mark.parametrize("name", REFUSED)
def test_what_mlx_lm_cannot_run_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedError, match=REFUSED[name]):
        back(CASES[name])


def _close(a: Any, b: Any) -> bool:
    return isinstance(a, int | float) and isinstance(b, int | float) and math.isclose(a, b, rel_tol=1e-6)


# --- what GGUF cannot say ---


@pytest.mark.parametrize("family", FIRST)
def test_published_models_lose_nothing(family: str) -> None:
    assert unsaid(FIRST[family]) == ()


@pytest.mark.parametrize(
    ("family", "more", "lines"),
    [
        ("gemma", {"rope_theta": 20000.0}, ["rope_theta is 20000.0"]),
        ("gemma2", {"query_pre_attn_scalar": 224}, ["query_pre_attn_scalar is 224"]),
        ("gemma2", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, ["rope_type is 'linear'"]),
        ("gemma3_text", {"sliding_window_pattern": 4}, ["layer_types is"]),
        ("gemma3_text", {"sliding_window_pattern": 1}, []),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, ["rope_type is 'dynamic'"]),
        ("llama", {"hidden_act": "relu"}, ["hidden_act is 'relu'"]),
        ("mistral", {"sliding_window": 4096}, ["sliding_window is 4096"]),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 512}, ["sliding_window is 512"]),
        ("qwen2_moe", {"norm_topk_prob": True}, ["norm_topk_prob is True"]),
        ("qwen3_moe", {"norm_topk_prob": False}, ["norm_topk_prob is False"]),
        ("qwen3_next", {"linear_value_head_dim": 64}, ["linear_value_head_dim is 64"]),
        ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 2}, ["no_rope_layers is"]),
        ("gpt_oss", {"swiglu_limit": 5.0}, ["swiglu_limit is 5.0"]),
        ("gpt_oss", {"layer_types": ["full_attention"] * 24}, ["layer_types is"]),
    ],
)
def test_what_a_file_cannot_say_is_said_here(family: str, more: dict[str, Any], lines: list[str]) -> None:
    found = unsaid(FIRST[family] | more)
    assert [line[: len(start)] for line, start in zip(found, lines, strict=True)] == lines
    assert all(len(line) < 200 for line in found)


# --- the files that say whose it is ---


def test_parameters_are_counted_as_gguf_counts_them(tmp_path: Path) -> None:
    for name in ("mixtral-tiny", "qwen2_moe-tiny", "llama-tiny"):
        shapes = {n: tuple(shape) for n, shape in CASES[name]["shapes"].items()}
        shapes |= {"blk.0.ffn_gate_exps.bias": (4, 7), "x_exps.weight": (3, 5), "scalar": ()}
        writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
        for tensor, shape in shapes.items():
            writer.add_tensor_info(tensor, shape, np.dtype(np.float32), 4 * math.prod(shape))
        assert count_parameters(shapes) == writer.get_total_parameter_count()


def test_a_card_that_lies_says_nothing() -> None:
    bomb = "a: &a [x]\n" + "".join(f"{c}: &{c} [{','.join([f'*{p}'] * 9)}]\n" for p, c in pairwise("abcdefg"))
    pages = (
        bomb, "[" * 5000, "a: " + "9" * 9000, "2024-99-99", "- a", "\x00", "a: b: c", "? [a]\n: b", "%", "!!python/x a",
    )  # fmt: skip
    for page in pages:
        assert model_card(f"---\n{page}\n---\n".encode()) == {}
    assert model_card(b"") == model_card(b"---") == model_card(b"\xff\xfe") == {}
    assert model_card(b"---\nlicense: mit") == {"license": "mit"}


def test_values_of_other_types_are_left_out() -> None:
    card = """---
license: {a: b}
tags: [1, x, [y], null]
language: no
base_model: [1, {name: 5, repo_url: here}, "", "/", "-"]
datasets: {a: b}
model_name: 7
version: 1.0
size_label: []
author: Me
---"""
    sampling = {"temperature": True, "top_k": 1.5, "top_p": "x", "min_p": 1e999, "mirostat": 2**40, "penalty_last_n": 3}
    sidecars = {"README.md": card.encode(), "generation_config.json": json.dumps(sampling).encode()}
    keys = general_keys({"_name_or_path": ["x"]}, sidecars, "a/b", {"t": (10, 100)})
    assert keys.pop("general.base_model.count") == 5
    base = [key for key in keys if key.startswith("general.base_model")]
    assert keys["general.base_model.1.repo_url"] == "here"
    assert "general.base_model.1.name" not in keys
    assert {key: value for key, value in keys.items() if key not in base} == {
        "general.sampling.penalty_last_n": 3,
        "general.name": "a-b",
        "general.author": "Me",
        "general.size_label": "1.0K",
        "general.dataset.count": 0,
        "general.tags": ["x"],
    }
    for broken in (b"{", b"[]", b"\xff", b"[" * 100_000, b'{"top_k": ' + b"9" * 5000 + b"}"):
        assert list(general_keys({}, {"generation_config.json": broken}, "", {})) == ["general.name"]


def test_llama_quantize_moves_two_keys_to_the_end() -> None:
    keys = model_keys(FIRST["llama"], 1) | {"tokenizer.ggml.model": "gpt2"}
    made = quantized_keys(keys, 15)
    assert list(made.items())[-2:] == [("general.quantization_version", 2), ("general.file_type", 15)]
    assert list(made)[:-2] == [key for key in keys if key not in list(made)[-2:]]


# --- refusals ---


def test_unknown_families_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match="model_type 'mamba2' is not a family that mlxquant writes") as caught:
        model_keys({"model_type": "mamba2"}, 0)
    assert re.search(r"known are .*gpt_oss.*smollm3", str(caught.value.hint))
    for name in ("LlamaForSequenceClassification", "Qwen2ForCausalLM", 7, ["LlamaForCausalLM"]):
        with pytest.raises(UnsupportedError, match=r"architectures is .*, which is no llama \(known: LlamaForCausalLM"):
            architecture(FIRST["llama"] | {"architectures": [name]})
    assert architecture(FIRST["llama"] | {"architectures": None}) == "llama"


@pytest.mark.parametrize(
    ("family", "more", "message"),
    [
        ("llama", {"hidden_size": "2048"}, "hidden_size is '2048', expected a whole number"),
        ("llama", {"hidden_size": -1}, "hidden_size is -1"),
        ("llama", {"num_hidden_layers": 2**32}, "num_hidden_layers is 4294967296"),
        ("llama", {"num_attention_heads": 0, "head_dim": None}, "num_attention_heads is 0, expected .* from 1"),
        ("llama", {"vocab_size": True}, "vocab_size is True"),
        ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, expected a finite number"),
        ("llama", {"rms_norm_eps": 10**400}, "rms_norm_eps is 1000.*, expected a finite number"),
        ("llama", {"rope_scaling": [1]}, r"rope_scaling is \[1\], expected an object"),
        ("llama", {"rope_scaling": {"rope_type": 3}}, "rope_type is 3"),
        ("llama", {"rope_scaling": {"rope_type": "llama3"}}, "factor is None"),
        ("llama", {"rope_scaling": FIRST["llama"]["rope_scaling"] | {"low_freq_factor": 4.0}}, "is no llama3 scaling"),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": "x"}}, "factor is 'x'"),
        ("granite", {"rope_scaling": FIRST["llama"]["rope_scaling"]}, "no rope scaling 'llama3' in its .* granite"),
        ("gemma3", {"text_config": 5}, "text_config is 5, expected an object"),
        ("phi3", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_type 'linear' is no phi3's"),
        ("phi3", {"rope_scaling": {"rope_type": "su", "long_factor": [1.0]}}, "long_factor .* 1 entries, expected 48"),
        ("phi3", {"original_max_position_embeddings": 1}, "original_max_position_embeddings is 1, expected .* from 2"),
        ("qwen3_next", {"full_attention_interval": 0}, "full_attention_interval is 0"),
    ],
)
def test_bad_configs(family: str, more: dict[str, Any], message: str) -> None:
    config = {key: value for key, value in (FIRST[family] | more).items() if value is not None}
    with pytest.raises(SourceError, match=message) as caught:
        (model_keys(config, 0), rope_tensors(config))
    assert len(caught.value.message) < 300
