"""Is a student a quantized form of its teacher? Asked of configs and tokenizers, before any weight is read.

Divergence over a vocabulary means something only where both have the same tokens, read the same windows and differ by
rounding. A fine-tune of the same shape cannot be told from a quantized form here, and its figures are still true.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from mlxquant.errors import PlanError, SourceError
from mlxquant.families.gguf_table import ARCHS
from mlxquant.families.known import REMAPPING
from mlxquant.families.shape import ModelShape
from mlxquant.files.reading import shown
from mlxquant.measure.windows import Windows, encode
from mlxquant.plan.facts import Facts
from mlxquant.run.text import Text

# Of ModelShape and, for families that it does not know, of Facts: what is counted, as in "has 24 layers".
_COUNTS = {
    "layers": "layers",
    "hidden_size": "columns of hidden states",
    "heads": "attention heads",
    "kv_heads": "heads for keys and values",
    "head_dim": "columns in a head",
    "experts": "experts",
    "experts_per_token": "experts for each token",
    "intermediate_size": "columns in its feed-forward parts",
    "moe_intermediate_size": "columns in its experts",
    "shared_intermediate_size": "columns in its shared expert",
    "kv_lora_rank": "columns in its latent keys and values",
    "q_lora_rank": "columns in its latent queries",
    "conv_channels": "channels of convolution",
    "state_heads": "heads of recurrent state",
    "state_key": "rows in a recurrent state",
    "state_value": "columns in a recurrent state",
}
_MIXERS = {
    "full": "full attention", "sliding": "attention in a window", "linear": "linear attention",
    "ssm": "a recurrent state", "none": "no attention",
}  # fmt: skip
_FFNS = {"dense": "one feed-forward part", "moe": "experts", "none": "no feed-forward part"}
_CHARACTERS = 5  # of text for each token, to begin with: English has four
_BEFORE = 8  # tokens to show before the first that differs
_NEXT = "name the model that it was quantized from as the teacher"


@dataclass(frozen=True)
class Side:
    """A teacher or a student, opened but for its weights. config: Hugging Face's, of a GGUF file too. name: as short as
    tells it from the others.
    """

    path: Path
    config: dict[str, Any]
    text: Text
    name: str


def check_student(teacher: Side, student: Side, windows: Windows) -> None:
    """Raises PlanError, naming the student, where it has another architecture, vocabulary or tokenizer."""
    _check_architecture(teacher, student)
    _check_vocabulary(teacher, student, windows)
    _check_tokenizer(teacher, student, windows)


def _check_architecture(teacher: Side, student: Side) -> None:
    if _family(student.config) != _family(teacher.config):
        ours, theirs = (shown(side.config.get("model_type")) for side in (student, teacher))
        raise _other(student, teacher, f"is of the family {ours}", f"of {theirs}")
    found, expected = _counts(student.config), _counts(teacher.config)
    for name, what in _COUNTS.items():
        a, b = found.get(name), expected.get(name)
        if a is not None and b is not None and a != b:
            raise _other(student, teacher, f"has {a:,} {what}", f"{b:,}")
    layers = zip(_kinds(student.config), _kinds(teacher.config), strict=False)
    for i, (kind, expected_kind) in enumerate(layers, 1):
        if kind != expected_kind:
            raise _other(student, teacher, f"has {kind} in layer {i}", expected_kind)


def _other(student: Side, teacher: Side, found: str, expected: str) -> PlanError:
    message = f"{student.name}: {found}, its teacher {teacher.name} {expected}: not a quantized form of it"
    return PlanError(message, hint=_NEXT)


def _family(config: Mapping[str, Any]) -> object:
    """What llama.cpp calls it where it has a place in GGUF, so that what GGUF does not tell apart is one."""
    model_type = config.get("model_type")
    module = REMAPPING.get(model_type, model_type) if isinstance(model_type, str) else model_type
    return ARCHS[module].name if isinstance(module, str) and module in ARCHS else module


def _shape(config: Mapping[str, Any]) -> ModelShape | None:
    try:
        return ModelShape.from_config(config)
    except SourceError:
        return None


def _counts(config: Mapping[str, Any]) -> dict[str, int | None]:
    """The numbers of _COUNTS; None, or left out, where nothing tells."""
    shape = _shape(config)
    found = {name: getattr(shape or Facts.of(config), name, None) for name in _COUNTS}
    if shape and "dense" not in shape.ffns:  # GGUF files do not say what nothing is made by
        found["intermediate_size"] = None
    return found


def _kinds(config: Mapping[str, Any]) -> list[str]:
    """Of each layer; none for a family that is not known."""
    shape = _shape(config)
    layers = zip(shape.mixers, shape.ffns, strict=True) if shape else ()
    return [f"{_MIXERS[mixer]} and {_FFNS[ffn]}" for mixer, ffn in layers]


def _check_vocabulary(teacher: Side, student: Side, windows: Windows) -> None:
    """Rows of the output head. llama.cpp cuts gemma3's to the tokens that its tokenizer has (conversion/gemma.py), so
    there the fewer rows count."""
    found, expected = (Facts.of(side.config).vocab for side in (student, teacher))
    if found is None or expected is None or found == expected:
        return
    cut = _family(student.config) == "gemma3" and int(windows.tokens_WL.max()) < min(found, expected)
    if not cut:
        raise _other(student, teacher, f"has a vocabulary of {found:,} tokens", f"of {expected:,}")


def _check_tokenizer(teacher: Side, student: Side, windows: Windows) -> None:
    """Both encode the text as far as it is evaluated, or a bit farther."""
    protocol, whole = windows.protocol, windows.corpus.text
    evaluated = (len(windows.tokens_WL) - 1) * protocol.step + protocol.context
    length = _CHARACTERS * evaluated
    while len(expected := encode(teacher.text, whole[:length])) < evaluated and length < len(whole):
        length *= 2
    found = encode(student.text, whole[:length])
    if found == expected:
        return
    at = next(i for i, (a, b) in enumerate(zip_longest(found, expected)) if a != b)
    before = teacher.text.decode(expected[max(0, at - _BEFORE) : at])
    ours, theirs = _piece(student, found[at : at + 1]), _piece(teacher, expected[at : at + 1])
    raise PlanError(
        f"{student.name}: has another tokenizer than its teacher {teacher.name}:"
        f" after {shown(before)} comes {ours}, and there {theirs}",
        hint=f"{_NEXT}; an old GGUF file may name a wrong pre-tokenizer: make it anew",
    )


def _piece(side: Side, ids: list[int]) -> str:
    return f"token {ids[0]}, {shown(side.text.decode(ids))}" if ids else "nothing"
