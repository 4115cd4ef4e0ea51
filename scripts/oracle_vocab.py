"""Writes tests/fixtures/gguf_vocab/: three small tokenizers, and what llama.cpp's converter makes of each folder of
tests/families/vocab_cases.py.

    PYTHONPATH=. python scripts/oracle_vocab.py [--train]

tests/oracle.py says where llama.cpp and a Python with torch, transformers and sentencepiece are looked for (`make
oracle` makes both). --train makes the tokenizers anew. The converter knows a `tokenizer.ggml.pre` by the ids of one
text under published vocabularies, so small ones would end it: here each is "any".
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tests import oracle
from tests.families import vocab_cases as cases

CONVERT = """
import logging, runpy, sys, traceback
sys.path.insert(0, sys.argv[1])
import conversion.base
if sys.argv[2] == "any":
    conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "any"
for folder in sys.argv[3:]:
    sys.argv = ["convert", "--vocab-only", "--outfile", folder + "/out.gguf", folder]
    try:
        runpy.run_path(sys.path[0] + "/convert_hf_to_gguf.py", run_name="__main__")
    except Exception:
        traceback.print_exc()
    logging.getLogger().handlers.clear()
"""
TRAIN = """
import os, sys
from pathlib import Path
from pydoc_data.topics import topics
import sentencepiece
from transformers import LlamaTokenizer
os.chdir(sys.argv[1])  # the model keeps the names of its files
folder = Path()
lines = [line.strip() for text in list(topics.values())[:40] for line in text.split(chr(10)) if line.strip()]
(folder / "text").write_text(chr(10).join(lines))
sentencepiece.SentencePieceTrainer.train(
    input="text", model_prefix="tokenizer", vocab_size=640, model_type="bpe",
    byte_fallback=True, user_defined_symbols=["<user>", "\\u2581\\u2581", "\\n\\n"], num_threads=1, minloglevel=2,
    normalization_rule_name="identity", remove_extra_whitespaces=False,
)
(folder / "text").unlink()
LlamaTokenizer.from_pretrained(str(folder.absolute())).save_pretrained(folder / "saved")
"""


def main() -> None:
    if "--train" in sys.argv:
        train_bpe()
        train_spm()
        os.execv(sys.executable, [sys.executable, __file__])  # the cases are made of what was trained
    found = ask(cases.CASES, "any")
    out = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    (cases.FIXTURES / "expected.json").write_text(out, "utf-8")


def ask(folders: dict[str, cases.Case], pre: str) -> dict[str, dict[str, list[Any]]]:
    """The tokenizer.* keys that the converter writes for each folder, as cases.summary keeps them; `pre`: "any", or
    "known" to have it look for the name."""
    with tempfile.TemporaryDirectory() as scratch:
        for name, (config, files) in folders.items():
            for file, data in (files | {"config.json": json.dumps(config).encode()}).items():
                path = Path(scratch, name, file)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
        said = run(CONVERT, oracle.llama_cpp(), pre, *(str(Path(scratch, name)) for name in folders))
        files_made = {name: Path(scratch, name, "out.gguf") for name in folders}
        if missing := [name for name, file in files_made.items() if not file.exists()]:
            raise RuntimeError(f"{said}\nno file for {missing}")
        return {name: read(file) for name, file in files_made.items()}


def read(file: Path) -> dict[str, list[Any]]:
    return cases.summary({k: typed(f) for k, f in gguf.GGUFReader(file).fields.items() if k.startswith("tokenizer.")})


def typed(field: gguf.ReaderField) -> Any:
    """As a value of the metadata that docs/architecture.md describes."""
    kind, value = field.types[-1].name, field.contents()
    if kind in ("INT32", "FLOAT32", "UINT32"):
        values = np.asarray(value, kind.lower() if kind != "FLOAT32" else np.float32)
        return values if isinstance(value, list) else values[()]
    return value


def train_bpe() -> None:
    from pydoc_data.topics import topics

    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    from mlxquant.families.gguf_pretokenizers import PRE_TOKENIZERS

    split = pre_tokenizers.Split(Regex(PRE_TOKENIZERS["qwen2"].expressions[0]), behavior="isolated")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=["<|endoftext|>", "<|eos|>", "<|pad|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(list(topics.values())[:40], trainer)
    (cases.FIXTURES / "bpe.json").write_text(tokenizer.to_str(), "utf-8")


def train_spm() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        run(TRAIN, scratch)
        (cases.FIXTURES / "spm.model").write_bytes(Path(scratch, "tokenizer.model").read_bytes())
        saved = json.loads(Path(scratch, "saved", "tokenizer.json").read_text("utf-8"))
    (cases.FIXTURES / "spm.json").write_text(json.dumps(saved, ensure_ascii=False), "utf-8")


def run(program: str, *arguments: str | Path) -> str:
    env = {"PYTHONPATH": str(oracle.llama_cpp() / "gguf-py"), "HF_HUB_OFFLINE": "1"}
    return oracle.run(oracle._python(), "-c", program, *arguments, env=env)


if __name__ == "__main__":
    main()
