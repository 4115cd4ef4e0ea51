"""Ollama's Modelfile for a GGUF file: what it does not read from the file itself.

Ollama takes the GGUF file's chat template where it is close to one it knows (server/model.go, detectChatTemplate;
template/template.go, Named), and else sends the bare prompt. A TEMPLATE of ours would have to be in Go's language, not
Jinja, and would be a guess: so a comment tells where to look.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mlxquant.errors import UsageError
from mlxquant.files.reading import shown

NAME = "Modelfile"
# Ollama reserves memory for so many tokens at once; the model's own limit may be far more than a Mac holds.
CONTEXT_TOKENS = 8192
_SAMPLING = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p",
             "penalty_repeat": "repeat_penalty"}  # fmt: skip
_ENDS = ("eos", "eot", "eom")


def modelfile(file: str, metadata: Mapping[str, Any], ends: Iterable[int] = ()) -> bytes:
    """For the GGUF file `file` in the same folder. `ends`: token ids that end an answer, beside those in `metadata`.

    Raises UsageError for a name that no line of text can hold.
    """
    if not file.isprintable():
        raise UsageError(f"--modelfile: no line can name {shown(file)}", hint="choose another output name")
    lines = ["# ollama create NAME -f Modelfile", f"FROM ./{file}"]
    if "tokenizer.chat_template" in metadata:
        lines += ["# If `ollama show --template NAME` says only {{ .Prompt }}, Ollama does not know the file's chat",
                  "# template: add a TEMPLATE \"\"\"...\"\"\" here, in Go's template language."]  # fmt: skip
    context = metadata.get(f"{metadata['general.architecture']}.context_length")
    if context is not None:
        lines += [f"# the model itself reads up to {int(context)} tokens"]
        lines += [f"PARAMETER num_ctx {min(int(context), CONTEXT_TOKENS)}"]
    for key, parameter in _SAMPLING.items():
        value = metadata.get(f"general.sampling.{key}")
        if value is not None:
            lines.append(f"PARAMETER {parameter} {value:.6g}")
    lines += [f'PARAMETER stop "{text}"' for text in _stops(metadata, ends)]
    return ("\n".join(lines) + "\n").encode()


def _stops(metadata: Mapping[str, Any], ends: Iterable[int]) -> list[str]:
    """The texts of all ends, but for those that a quoted line cannot hold."""
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    known = [metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in _ENDS]
    ids = dict.fromkeys([*(int(i) for i in known if i is not None), *ends])
    texts = [tokens[i] for i in ids if i < len(tokens)]
    return [text for text in texts if text.isprintable() and '"' not in text and "\\" not in text]
