"""Published sizes of models people run, beside what a config file alone predicts.

    python benchmarks/sizes.py            the table as Markdown
    python benchmarks/sizes.py --guides   what guides on RAM say, and the rule parameters x bits / 8, as Markdown
    python benchmarks/sizes.py --json     all of it as one JSON object

Configs and sources are in benchmarks/sizes/. A prediction is the plan that `convert` would make of the checkpoint that
the config stands for, plus the estimate of what the file holds beside tensors; nothing is downloaded.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mlxquant.families.checkpoint import checkpoint, has_merges, header_bytes, parameters
from mlxquant.families.mlx_config import text_config
from mlxquant.files.gguf_spec import GGUFSpec
from mlxquant.plan.gguf_plan import plan_checkpoint
from mlxquant.plan.gguf_types import tensor_types, type_settings
from mlxquant.plan.plan import make_plan
from mlxquant.plan.recipe import settings

HERE = Path(__file__).with_suffix("")
PUBLISHED, GUIDES = "published.csv", "guides.csv"
UNITS = {"B": 1, "GB": 10**9, "GiB": 2**30}
TOLERANCE = 0.01
# The models and levels that were asked for.
MODELS = (
    "llama-3.1-8b", "llama-3.1-70b", "mistral-7b-v0.3", "qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "qwen3-8b", "qwen3-14b",
    "qwen3-32b", "qwen3-30b-a3b", "gemma-3-4b", "gemma-3-27b", "gpt-oss-20b", "deepseek-v3",
)  # fmt: skip
LEVELS = ("mlx 4", "mlx 6", "mlx 8", "gguf Q4_K_M", "gguf Q5_K_M", "gguf Q8_0")
# llama.cpp cuts Gemma 3's embedding to the tokens that there are (ggml-vocab-gemma-3).
GEMMA_TOKENS = 262_144
# Of google/gemma-3-*-it: 27 SigLIP layers, 1152 wide, 4304 within, 4096 patches of 14 x 14; in 16 bits. Without the
# projector to the text model, which is below 0.1 % of the file.
VISION_BYTES = 2 * (27 * (4 * 1152 * 1153 + 2 * 1152 * 4304 + 4304 + 1152 + 4 * 1152) + 1152 * (14 * 14 * 3 + 4096 + 3))


@dataclass(frozen=True)
class Row:
    """One published file. `differs`: what it has that the plan of its level has not; it is added, see predict()."""

    model: str
    level: str
    predicted_bytes: int
    published_bytes: int
    printed: str
    differs: str
    source: str

    @property
    def error(self) -> float:
        return self.predicted_bytes / self.published_bytes - 1


@cache
def config_of(model: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((HERE / "configs" / f"{model}.json").read_text())
    del found["_source"]
    return found


def lines(name: str) -> list[dict[str, str]]:
    """The rows of a table beside this file."""
    with (HERE / name).open(newline="") as file:
        return list(csv.DictReader(file))


def row_of(line: Mapping[str, str]) -> Row:
    predicted = predict(line["model"], line["level"], line["differs"], line["holds"] == "file")
    published = round(float(line["published"]) * UNITS[line["unit"]])
    printed = line["published"] if line["unit"] == "B" else f"{line['published']} {line['unit']}"
    return Row(line["model"], line["level"], predicted, published, printed, line["differs"], line["source"])


@cache
def predict(model: str, level: str, differs: str = "", whole_file: bool = True) -> int:
    """Bytes of the file, or of its tensors alone.

    `differs`, of published files: 'head twice': a tied head written beside the embedding; 'vision': Gemma 3's tower;
    'groups of 32' or '128'; 'experts MXFP4'.
    """
    form, name = level.split()
    config = config_of(model)
    if form == "mlx":
        return _mlx(config, int(name), differs, whole_file)
    if "head twice" in differs:
        config = config | {"tie_word_embeddings": False}
    specs = deepseek(config, name) if model == "deepseek-v3" else _gguf(config, name)
    vocab = int(text_config(config)["vocab_size"])
    header = header_bytes("gguf", vocab, (spec.name for spec in specs), has_merges(config))
    return sum(spec.nbytes for spec in specs) + header * whole_file


def _mlx(config: dict[str, Any], bits: int, differs: str, whole_file: bool) -> int:
    floats = {key: value for key, value in config.items() if key != "quantization_config"}
    sets = ["experts.*weight=mxfp4"] if "experts MXFP4" in differs else []
    group_size = next((size for size in (32, 128) if f"groups of {size}" in differs), 64)
    asked = settings(bits=bits, group_size=group_size, recipe="uniform", sets=sets)
    plan = make_plan(floats, checkpoint(floats), asked)
    parts = [part for tensor in plan.tensors for part in tensor.parts]
    more = VISION_BYTES if "vision" in differs else 0
    if "head twice" in differs:
        more += next(tensor.nbytes for tensor in plan.tensors if tensor.name.endswith("embed_tokens.weight"))
    header = header_bytes("mlx", 0, (part.name for part in parts))
    return sum(part.nbytes for part in parts) + more + header * whole_file


def _gguf(config: dict[str, Any], file_type: str) -> list[GGUFSpec]:
    tokens = GEMMA_TOKENS if config["model_type"] == "gemma3" else None
    plan = plan_checkpoint(config, checkpoint(config), type_settings(file_type), tokens=tokens)
    return [tensor.spec for tensor in plan.tensors]


# DeepSeek-V3 is not among the families that `convert` writes as GGUF; its tensors are named here, as llama.cpp named
# them when the published files were made (b4944: kv_b in one piece).
_DEEPSEEK = (
    (r"model\.embed_tokens", "token_embd"), (r"model\.norm", "output_norm"), (r"lm_head", "output"),
    (r"model\.layers\.(\d+)\.", r"blk.\1."), (r"self_attn\.q_a_proj", "attn_q_a"),
    (r"self_attn\.q_b_proj", "attn_q_b"), (r"self_attn\.q_a_layernorm", "attn_q_a_norm"),
    (r"self_attn\.kv_a_proj_with_mqa", "attn_kv_a_mqa"), (r"self_attn\.kv_a_layernorm", "attn_kv_a_norm"),
    (r"self_attn\.kv_b_proj", "attn_kv_b"), (r"self_attn\.o_proj", "attn_output"),
    (r"input_layernorm", "attn_norm"), (r"post_attention_layernorm", "ffn_norm"),
    (r"mlp\.gate\.e_score_correction_bias", "exp_probs_b.bias"), (r"mlp\.gate\.weight", "ffn_gate_inp.weight"),
    (r"mlp\.experts\.\d+\.(\w+)_proj", r"ffn_\1_exps"), (r"mlp\.shared_experts\.(\w+)_proj", r"ffn_\1_shexp"),
    (r"mlp\.(\w+)_proj", r"ffn_\1"),
)  # fmt: skip


def deepseek(config: Mapping[str, Any], file_type: str) -> list[GGUFSpec]:
    """Types by llama.cpp's rules for the tensors that its converter makes."""
    shapes: dict[str, tuple[int, ...]] = {}
    for spec in checkpoint(config).values():
        name = spec.name
        for pattern, theirs in _DEEPSEEK:
            name = re.sub(pattern, theirs, name)
        stacked = (config["n_routed_experts"],) if "_exps" in name else ()
        shapes[name] = stacked + spec.shape
    keys = {"general.architecture": "deepseek2", "deepseek2.block_count": config["num_hidden_layers"]}
    keys |= {"deepseek2.attention.head_count": 128, "deepseek2.expert_count": config["n_routed_experts"]}
    types, _ = tensor_types(keys, shapes, type_settings(file_type))
    return [GGUFSpec(name, shape, types[name]) for name, shape in shapes.items()]


def markdown(found: list[Row]) -> Iterator[str]:
    yield "| Model | Level | Predicted, bytes | Published | Error | Differs |"
    yield "|---|---|--:|--:|--:|---|"
    for row in found:
        exact = row.predicted_bytes == row.published_bytes
        error = "exact" if exact else f"{row.error:+.2%}"
        published = f"{int(row.printed):,}" if row.printed.isdigit() else row.printed
        yield f"| {row.model} | {row.level} | {row.predicted_bytes:,} | {published} | {error} | {row.differs} |"
    known = {(row.model, row.level) for row in found}
    missing = [(model, level) for model in MODELS for level in LEVELS if (model, level) not in known]
    yield f"\nNo published figure was found for {len(missing)} of {len(MODELS) * len(LEVELS)}; predicted alone:\n"
    yield "| Model | Level | Predicted, bytes |"
    yield "|---|---|--:|"
    for model, level in missing:
        yield f"| {model} | {level} | {predict(model, level):,} |"


@dataclass(frozen=True)
class Claim:
    """What a guide says of one file."""

    says: str
    model: str
    level: str
    stated_bytes: int
    computed_bytes: int
    source: str

    @property
    def error(self) -> float:
        return self.stated_bytes / self.computed_bytes - 1


def claim_of(line: Mapping[str, str]) -> Claim:
    stated = round(float(line["stated"]) * UNITS[line["unit"]])
    computed = predict(line["model"], line["level"])
    return Claim(line["says"], line["model"], line["level"], stated, computed, line["source"])


def guides() -> Iterator[str]:
    yield "| A guide says | Meant here | GB | Computed GB | GiB | The guide is off by | Source |"
    yield "|---|---|--:|--:|--:|--:|---|"
    for claim in map(claim_of, lines(GUIDES)):
        gb, gib = claim.computed_bytes / 10**9, claim.computed_bytes / 2**30
        yield (
            f"| {claim.says} | {claim.model} {claim.level.split()[1]} | {claim.stated_bytes / 10**9:.2f} | {gb:.2f} "
            f"| {gib:.2f} | {claim.error:+.1%} | {claim.source} |"
        )
    yield ""
    yield "| Parameters x bits / 8 is off by | MLX 4-bit | MLX 8-bit | Q4_K_M | Q8_0 |"
    yield "|---|--:|--:|--:|--:|"
    for model in MODELS:
        count = parameters(config_of(model))
        pairs = (("mlx 4", 4), ("mlx 8", 8), ("gguf Q4_K_M", 4), ("gguf Q8_0", 8))
        off = (count * bits / 8 / predict(model, level) - 1 for level, bits in pairs)
        yield f"| {model} ({count / 1e9:.2f}B) | " + " | ".join(f"{value:+.0%}" for value in off) + " |"


def main() -> None:
    if "--json" in sys.argv:
        found = [asdict(row) | {"error": row.error} for row in map(row_of, lines(PUBLISHED))]
        said = [asdict(claim) | {"error": claim.error} for claim in map(claim_of, lines(GUIDES))]
        sys.stdout.write(json.dumps({"rows": found, "guides": said}) + "\n")
    else:
        text = guides() if "--guides" in sys.argv else markdown([row_of(line) for line in lines(PUBLISHED)])
        sys.stdout.write("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
