"""What llama.cpp's tools and mlxquant are both asked to make GGUF files of, and how the files are compared.

`CASES`: tiny models of 13 families, the same bits on every machine. `RUNS`: what is made of them. For each,
`theirs` runs convert_hf_to_gguf.py and llama-quantize, `ours` runs `mlxquant convert` with the same flags, and
`summary` is what must be equal. test_gguf_oracle.py compares the two; scripts/oracle_files.py keeps the summaries of
theirs, so that test_gguf_fixtures.py can compare without the tools.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from mlxquant.files.gguf_file import GGUFFile
from mlxquant.plan.gguf_plan import plain_value
from tests import oracle
from tests.cli.runner import mlxquant
from tests.families import vocab_cases
from tests.families.gguf_checkpoints import VARIANTS, numbers

FIXTURES = Path(__file__).parent.parent / "fixtures" / "gguf_files"
# Metadata that differs on purpose: these, and the `differs` of CASES. docs/gguf.md says why, of each.
OURS_ALONE = (
    "mlxquant.version", "mlxquant.source", "mlxquant.settings", "mlxquant.plan_sha256", "mlxquant.tensors_sha256",
)  # fmt: skip
NAME_ALONE = "quantize.imatrix.file"  # llama-quantize keeps the path as it was given
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
CARD = "---\nlicense: apache-2.0\nlanguage:\n- en\nbase_model:\n- org/Base-7B-v0.1\n---\n# A model\n"


@dataclass(frozen=True)
class Case:
    """`variant` of gguf_checkpoints.py, `width` columns wide; `files`: the tokenizer's; `config`: other entries.
    `rows`: of the embedding, more than there are tokens.

    `pre`: the `tokenizer.ggml.pre` of a BPE: the converter knows tokenizers by a hash of what they make of one text,
    and this one is nobody's. `differs`: {key: (their value, ours)} that differ on purpose.
    """

    variant: str
    width: int
    files: Mapping[str, bytes]
    pre: str | None = None
    layers: int = 2
    tied: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)
    convert: tuple[str, ...] = ()
    rows: int = 704
    differs: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """`type` for both tools, and flags that both take. `source`: another run's file instead of the checkpoint (for
    llama-quantize: instead of the converter's file). `imatrix`: "gguf" or "dat", one of the kept files."""

    type: str
    flags: tuple[str, ...] = ()
    source: str = ""
    imatrix: str = ""


FLOATS = {name: Run(name) for name in ("F32", "F16", "BF16")}
BASE = "BF16"  # what --outtype auto makes of these checkpoints, and llama-quantize's source
MIXTURES = {name: Run(name) for name in ("Q4_K_M", "Q3_K_L", "Q5_K_S", "Q2_K")}
OTHERS = {
    name: Run(name)
    for name in (
        "Q3_K_S", "Q3_K_M", "Q4_0", "Q4_1", "Q4_K_S", "Q5_0", "Q5_1", "Q5_K_M", "Q6_K", "Q8_0", "IQ4_NL", "IQ4_XS",
        "TQ1_0", "TQ2_0",
    )
}  # fmt: skip
IMPORTANCE = {
    "imatrix-Q4_K_M": Run("Q4_K_M", imatrix="gguf"),
    "imatrix.dat-Q4_K_M": Run("Q4_K_M", imatrix="dat"),
    "imatrix-Q2_K_S": Run("Q2_K_S", imatrix="gguf"),
    "imatrix-Q4_0": Run("Q4_0", imatrix="gguf"),
    "imatrix-Q3_K_M": Run("Q3_K_M", imatrix="gguf"),
    "imatrix-IQ4_XS": Run("IQ4_XS", imatrix="gguf"),
}
_AGAIN = ("--allow-requantize",)
FLAGS = {
    "pure-Q4_K_M": Run("Q4_K_M", ("--pure",)),
    "pure-Q6_K": Run("Q6_K", ("--pure", "--token-embedding-type", "q8_0")),
    "pure-patterns": Run("Q5_K_M", ("--pure", "--tensor-type", "ffn_down=q6_k", "--output-tensor-type", "q8_0")),
    "asked": Run("Q4_K_M", ("--output-tensor-type", "q5_1", "--token-embedding-type", "q3_k")),
    "asked-F16": Run("F16", ("--output-tensor-type", "q8_0")),
    "patterns": Run("Q5_K_S", ("--tensor-type", "ffn_down=q6_k", "--tensor-type", r"blk\.1\.attn_[qk]=Q8_0")),
    "patterns-imatrix": Run("Q2_K", ("--tensor-type", "attn_v=q4_0"), imatrix="gguf"),
    "asked-patterns": Run("Q4_K_S", ("--tensor-type", "token_embd=q5_k", "--token-embedding-type", "q3_k")),
    "from-F16": Run("Q4_K_M", source="F16"),
    "from-F32": Run("Q4_K_M", source="F32"),
    "BF16-to-F16": Run("F16", source="BF16"),
    "again-Q8_0": Run("Q8_0", source="Q8_0"),
    "again-Q4_K_M": Run("Q4_K_M", _AGAIN, source="Q4_K_M"),
    "Q8_0-to-Q3_K_S": Run("Q3_K_S", _AGAIN, source="Q8_0", imatrix="gguf"),
    "Q4_K_M-to-Q3_K_L": Run("Q3_K_L", _AGAIN, source="Q4_K_M"),
    "Q4_K_M-to-F16": Run("F16", _AGAIN, source="Q4_K_M"),
    "Q3_K_L-to-Q4_1": Run("Q4_1", _AGAIN, source="Q3_K_L"),
    "Q2_K-to-IQ4_NL": Run("IQ4_NL", _AGAIN, source="Q2_K"),
    "IQ4_XS-to-Q5_K_M": Run("Q5_K_M", _AGAIN, source="IQ4_XS"),
    "TQ1_0-to-Q4_0": Run("Q4_0", _AGAIN, source="TQ1_0"),
    "Q5_1-to-F32": Run("F32", _AGAIN, source="Q5_1"),
}


def runs(name: str) -> dict[str, Run]:
    """Every case: floats and the usual mixtures; where an imatrix is kept, those with it. The first: all there are."""
    made = MIXTURES | (OTHERS | FLAGS if name == "llama" else {}) | IMPORTANCE
    made = {key: run for key, run in made.items() if not run.imatrix or imatrix_file(name, run.imatrix).exists()}
    if name == "gpt_oss":  # llama-quantize stops at MXFP4 without it
        made = {key: replace(run, flags=("--allow-requantize", *run.flags)) for key, run in made.items()}
    return FLOATS | made


def imatrix_file(name: str, form: str) -> Path:
    return FIXTURES / f"{name}.imatrix.{form}"


def _bpe(**entries: Any) -> dict[str, bytes]:
    named = {"bos_token": "<|endoftext|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>", "chat_template": TEMPLATE}
    return vocab_cases.bpe("llama", named, **entries)[1]


def _spm(**more: Any) -> dict[str, bytes]:
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True,
             "add_eos_token": False, "chat_template": TEMPLATE, **more}  # fmt: skip
    return vocab_cases.spm("llama", named)[1]


_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 1024}  # fmt: skip
CASES = {
    "llama": Case("llama", 256, _bpe(), "qwen2", layers=4, config={"rope_scaling": _LLAMA3, "rope_theta": 500000.0}),
    "mistral": Case("mistral", 288, _spm()),  # 288: a multiple of 32, not of 256
    "mixtral": Case("mixtral", 256, _spm()),
    "qwen2": Case("qwen2", 208, _bpe(), "qwen2", tied=True),  # 208: not even of 32
    "qwen3_moe": Case("qwen3_moe", 256, _bpe(), "qwen2"),
    "gemma2": Case("gemma2", 256, _spm(), tied=True),
    "gemma3_text": Case("gemma3_text", 320, _spm(), tied=True),
    "phi3": Case("phi3", 256, _spm(tokenizer_class="LlamaTokenizer")),
    "granite": Case("granite", 512, _bpe(), "qwen2"),
    "olmo2": Case("olmo2", 256, _bpe(), "qwen2"),
    "smollm3": Case("smollm3", 256, _bpe(), "qwen2", layers=4, tied=True),
    "qwen3_next": Case("qwen3_next", 256, _bpe(), "qwen2", convert=("--no-mtp",),
                       differs={"qwen3next.full_attention_interval": (["uint32", 4], ["uint32", 2])}),
    "gpt_oss": Case("gpt_oss-mxfp4", 256, _bpe(), "qwen2",
                    differs={"general.file_type": (["uint32", 38], None)}),
}  # fmt: skip


def make(folder: Path, name: str) -> Path:
    """The checkpoint of a case: numbers from integers alone, bfloat16."""
    case = CASES[name]
    folder.mkdir(parents=True)
    config, tensors = VARIANTS[case.variant](np.random.default_rng(0), case.width, case.layers, case.tied)
    config = {"torch_dtype": "bfloat16", "vocab_size": case.rows, "tie_word_embeddings": case.tied} | config
    tensors |= {tensor: np.empty((case.rows, case.width)) for tensor in tensors.keys() & _VOCABULARY}
    stored = {tensor: numbers(tensor, value) for tensor, value in tensors.items()}
    for tensor in stored:
        if tensor.endswith("A_log"):  # torch's exponential is not rounded correctly, but of 0
            stored[tensor] = np.zeros_like(stored[tensor])
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | dict(case.config), indent=2))
    (folder / "README.md").write_text(CARD)
    for file, data in case.files.items():
        (folder / file).write_bytes(data)
    return folder


def theirs(folder: Path, made: Path, name: str, wanted: str) -> Path:
    """The file that llama.cpp's tools make in `made`, with those it is made of."""
    run, out = runs(name)[wanted], made / f"{wanted}.gguf"
    if out.exists():
        return out
    made.mkdir(exist_ok=True)
    if run in FLOATS.values():
        oracle.convert(folder, out, wanted.lower(), *CASES[name].convert, pre=CASES[name].pre)
        return out
    source = theirs(folder, made, name, run.source or BASE)
    matrix = ("--imatrix", imatrix_file(name, run.imatrix)) if run.imatrix else ()
    oracle.quantize(source, out, run.type, *run.flags, *matrix)
    return out


def ours(folder: Path, made: Path, name: str, wanted: str) -> Path:
    """The file that `mlxquant convert` makes in `made`, from the checkpoint unless the run says otherwise."""
    run, out = runs(name)[wanted], made / f"{wanted}.gguf"
    if out.exists():
        return out
    made.mkdir(exist_ok=True)
    source = ours(folder, made, name, run.source) if run.source else folder
    matrix = ("--imatrix", imatrix_file(name, run.imatrix)) if run.imatrix else ()
    result = mlxquant("convert", source, "-o", out, "--type", run.type, *run.flags, *matrix)
    assert result.code == 0, result
    return out


def summary(path: Path) -> dict[str, Any]:
    """{"keys": {key: [type, value]}, "tensors": {name: "type shape sha256"}, "order": {of both: sha256}}, without
    OURS_ALONE. Arrays and long texts as [type, length, sha256]; a sha256 is cut to 16 digits.

    Outermost axes of 1 are left out, as llama-quantize leaves them out (ggml_n_dims), and the converter does not."""
    file = GGUFFile(path)
    tensors = {}
    for name, t in file.tensors.items():
        shape = "x".join(map(str, t.shape)).removeprefix("1x")
        tensors[name] = f"{t.type_name} {shape} {_digest(file.read_rows(name, 0, t.rows).tobytes())}"
    keys = {key: _short(*plain_value(value)) for key, value in file.typed.items() if key not in OURS_ALONE}
    if NAME_ALONE in keys:
        kind, path = keys[NAME_ALONE]
        keys[NAME_ALONE] = [kind, Path(path).name]
    order = {"keys": _digest(" ".join(keys).encode()), "tensors": _digest(" ".join(tensors).encode())}
    return {"keys": keys, "tensors": tensors, "order": order}


def condensed(told: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Summaries by run, as they are kept: the first whole, of the others what differs from it, and the order."""
    first = next(iter(told.values()))
    return {run: _less(made, first) if made is not first else dict(made) for run, made in told.items()}


def _less(made: Mapping[str, Any], first: Mapping[str, Any]) -> dict[str, Any]:
    parts = ("keys", "tensors")
    return {p: {k: v for k, v in made[p].items() if first[p].get(k) != v} for p in parts} | {"order": made["order"]}


def kept(name: str) -> dict[str, dict[str, Any]]:
    """Summaries by run from CASE.json."""
    found = json.loads((FIXTURES / f"{name}.json").read_text("utf-8"))["files"]
    first = next(iter(found.values()))
    return {
        run: {part: first[part] | made[part] for part in ("keys", "tensors")} | {"order": made["order"]}
        for run, made in found.items()
    }


def differences(name: str, wanted: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """Everything in which two summaries differ and should not: none. Files of llama-quantize in their order, too;
    the converter's tensors stand as they came."""
    allowed, found = CASES[name].differs if name in CASES else {}, []
    for part in ("tensors", "keys"):
        for key in {**theirs[part], **ours[part]}:
            a, b = theirs[part].get(key), ours[part].get(key)
            if a != b and not _is_allowed(allowed.get(key), a, b):
                found.append(f"{key}: {a} in llama.cpp's, {b} in ours")
        if not found and wanted not in FLOATS and theirs["order"][part] != ours["order"][part]:
            found.append(f"{part} stand in another order")
    return found


def _is_allowed(pair: tuple[Any, Any] | None, theirs: Any, ours: Any) -> bool:
    return pair is not None and theirs == pair[0] and pair[1] in (None, ours)


def _short(kind: str, value: Any) -> list[Any]:
    if isinstance(value, list) or (isinstance(value, str) and len(value) > 200):
        return [kind, len(value), _digest(json.dumps(value).encode())]
    return [kind, value]


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
