"""GGUF keys against what convert_hf_to_gguf.py wrote for the same configs (tests/fixtures/gguf_keys/*.json, which
scripts/oracle_keys.py made), and back: stock mlx-lm reads the same model from a file's keys as from config.json."""

from __future__ import annotations

import json
import math
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

# Configs that are silent about what stock mlx-lm takes otherwise than transformers, or that it cannot read.
NO_WAY_BACK = {
    "qwen2_moe-tiny", "olmo2-tiny",
    "gemma3-tiny", "phi3-rope_parameters of transformers 5", "mixtral-with a head_dim", "qwen2-with a head_dim",
    "gemma3_text-a cap on the logits", "llama-linear", "llama-Llama 1, which names no key heads",
    "llama-heads wider than the model", "gemma3_text-tiny", "llama-llama3, other frequency factors",
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


@pytest.mark.parametrize("name", [n for n in CASES if "silent" not in n and n not in NO_WAY_BACK])
def test_stock_mlx_lm_reads_the_same_model_back(name: str) -> None:
    case = CASES[name]
    before, after = arguments(dict(case["config"])), arguments(back(case))
    different = {key for key in before if before[key] != after[key] and not _close(before[key], after[key])}
    if unsaid(case["config"]):  # then it must be seen here too, or be what mlx-lm itself leaves out
        assert different <= {"rope_theta", "no_rope_layers", "layer_types", "query_pre_attn_scalar", "norm_topk_prob"}
    else:
        assert not different, {key: (before[key], after[key]) for key in different}


def _close(a: Any, b: Any) -> bool:
    return isinstance(a, int | float) and isinstance(b, int | float) and math.isclose(a, b, rel_tol=1e-6)
