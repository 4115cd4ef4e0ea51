"""What llama.cpp's convert_hf_to_gguf.py makes of many config.json files -> tests/fixtures/gguf_keys/<family>.json.

    MLXQUANT_LLAMA_CPP=.../llama.cpp PYTHONPATH=.../llama.cpp/gguf-py python scripts/oracle_keys.py [family ...]

Run by a Python that has torch, transformers and sentencepiece, not by mlxquant's. It calls the script's own classes on
folders with a config, the small files beside it and two tensors of the right size, and asks the writer what it holds:
every key but the tokenizer's, with its GGUF type, in order, and the rope factors as the bytes they are.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
LLAMA_CPP = Path(os.environ["MLXQUANT_LLAMA_CPP"])
sys.path[:0] = [str(HERE.parent), str(LLAMA_CPP), str(LLAMA_CPP / "gguf-py")]

import gguf  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from conversion import ModelBase, ModelType, get_model_architecture, get_model_class  # noqa: E402
from safetensors.numpy import save_file  # noqa: E402

from scripts.oracle_configs import CASES  # noqa: E402
from tests import tiny_families  # noqa: E402

OUT = HERE.parent / "tests" / "fixtures" / "gguf_keys"
# Not those two: the tests' gpt_oss is in MLX's names, and their qwen3_moe has a dense layer, which llama.cpp's has not.
TINY = tuple(family for family in CASES if family not in ("gpt_oss", "qwen3_moe"))


def convert(folder: Path) -> gguf.GGUFWriter:
    """The writer when all of it is known and nothing is written."""
    model_class = get_model_class(get_model_architecture(ModelBase.load_hparams(folder, False), ModelType.TEXT))
    model_class.set_vocab = lambda self: None
    if model_class.supports_mtp_export:  # without these layers, as mlx-lm runs it
        model_class.no_mtp = True
    with torch.inference_mode():
        model = model_class(folder, gguf.LlamaFileType.ALL_F32, folder / "out.gguf", eager=True)
        model.prepare_tensors()
        model.prepare_metadata(vocab_only=False)
    return model.gguf_writer


def ask(folder_name: str, config: dict[str, Any], files: dict[str, str], tensors: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / folder_name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        for name, text in files.items():
            (folder / name).write_text(text)
        save_file(tensors, folder / "model.safetensors")
        writer = convert(folder)
    made = {name: info for part in writer.tensors for name, info in part.items()}
    return {
        "folder": folder_name,
        "config": config,
        "files": files,
        "shapes": {name: [int(n) for n in info.shape] for name, info in made.items()},
        "keys": [spell(key, value) for part in writer.kv_data for key, value in part.items()],
        "rope": {n: i.tensor.astype("<f4").tobytes().hex() for n, i in made.items() if n.startswith("rope_f")},
    }


def spell(key: str, value: Any) -> list[Any]:
    kind = value.type.name.lower()
    if value.type == gguf.GGUFValueType.ARRAY:
        kind = f"array of {(value.sub_type or gguf.GGUFValueType.get_type(value.value[0])).name.lower()}"
    return [key, kind, value.value]


def published(family: str) -> dict[str, dict[str, Any]]:
    """Each case is asked with a final norm and a few rows of the embedding: keys do not depend on tensors."""
    import numpy as np

    cases, first = {}, next(iter(CASES[family].values()))
    for name, more in CASES[family].items():
        config = first | {"folder": "model", "files": {}, "_name_or_path": None} | more if more is not first else more
        config = {k: v for k, v in config.items() if v is not None or k in first}
        config = {k: v for k, v in config.items() if v is not None or first[k] is None}
        folder, files = config.pop("folder"), config.pop("files", {})
        at = "language_model.model." if family == "gemma3" else "model."
        tensors = {f"{at}norm.weight": np.zeros(1024, np.float32)}
        cases[name] = ask(folder, config, files, tensors)
    return cases


def tiny(family: str) -> dict[str, Any]:
    import numpy as np

    tied = family in tiny_families.ALWAYS_TIED
    config, tensors = tiny_families.FAMILIES[family](np.random.default_rng(0), 128, 2, tied)
    tensors = {name: value for name, value in tensors.items() if "embed_tokens" not in name}  # wants a tokenizer
    return ask("tiny", config | {"vocab_size": tiny_families.VOCAB, "tie_word_embeddings": tied}, {}, tensors)


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    made_by = f"scripts/oracle_keys.py with llama.cpp's converter and transformers {transformers.__version__}"
    for family in sys.argv[1:] or CASES:
        cases = published(family)
        if family in TINY:
            cases["tiny"] = tiny(family)
        page = {"made by": made_by, "cases": cases}
        (OUT / f"{family}.json").write_text(json.dumps(page, indent=1, ensure_ascii=False) + "\n")
        print(f"{family}: {len(cases)} cases")


if __name__ == "__main__":
    main()
