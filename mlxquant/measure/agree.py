"""Do two models say the same on a short prompt? The check that no list of checks replaces."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlxquant.run.device import Device
from mlxquant.run.ready import make_ready
from mlxquant.run.text import Text

# Prose, code, numbers and a question: enough for a broken layout to show, short enough for a CPU.
PROMPT = (
    "The capital of France is Paris, and the capital of Japan is Tokyo.\n"
    "def mean(values):\n    return sum(values) / len(values)\n"
    "Q: What is 17 + 25?\nA:"
)
# Mean KL divergence in nats beyond which the output is broken and not merely coarse: 10 times or more what honest
# round-to-nearest costs at these bits on small models, and still far below what a doubled norm or a swapped
# projection does (5 and more).
LIMITS = {8: 0.2, 6: 0.4, 5: 0.8, 4: 2.0, 3: 4.0, 2: 8.0}


@dataclass(frozen=True)
class Agreement:
    """kl_nats: mean KL(source || output) over the prompt's positions. top1: share of them with the same best token."""

    kl_nats: float
    top1: float
    tokens: int
    finite: bool


def agreement(source: Path, output: Path, device: Device, prompt: str = PROMPT) -> Agreement:
    """Runs the prompt through both models, one after the other so that only one is in memory.

    Raises MemoryBudgetError, before any weight is read, when one of them does not fit the machine.
    """
    tokens = Text.load(output).encode(prompt)
    p_LV, q_LV = (log_probabilities(path, tokens, device) for path in (source, output))
    kl_L = (np.exp(p_LV) * (p_LV - q_LV)).sum(-1)
    same = p_LV.argmax(-1) == q_LV.argmax(-1)
    return Agreement(float(kl_L.mean()), float(same.mean()), len(tokens), bool(np.isfinite(q_LV).all()))


def log_probabilities(path: Path, tokens: list[int], device: Device) -> np.ndarray[Any, Any]:
    """log softmax of the logits, float64 (L, vocabulary)."""
    import mlx.core as mx

    ready = make_ready(path, device, Text.load(path), context_tokens=len(tokens))
    logits_LV = np.array(ready.loaded.model(mx.array([tokens]))[0].astype(mx.float32)).astype(np.float64)
    del ready
    mx.clear_cache()
    logits_LV -= logits_LV.max(-1, keepdims=True)
    return np.asarray(logits_LV - np.log(np.exp(logits_LV).sum(-1, keepdims=True)))


def limit(bits: int) -> float:
    """Nats; for the smallest width in the plan."""
    return LIMITS[max(b for b in LIMITS if b <= max(bits, 2))]
