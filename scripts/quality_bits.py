"""Bits per weight of a file type: llama.cpp's choice of types (plan/gguf_types.py) over the shapes of a model.

    python scripts/quality_bits.py          the table of docs/quality.md

The shapes are those of the published config.json files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mlxquant.codecs.ggml import block
from mlxquant.plan.gguf_types import tensor_types, type_settings

LEVELS = ("Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "IQ4_XS", "Q4_0", "Q3_K_L", "Q3_K_M", "Q2_K")


@dataclass(frozen=True)
class Shape:
    """A dense transformer. `heads_width`: of all query heads together; `kv_width`: of all key heads."""

    name: str
    arch: str
    layers: int
    width: int
    ffn: int
    heads: tuple[int, int]
    heads_width: int
    kv_width: int
    vocabulary: int
    tied: bool = False

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Matrices and norms by GGUF name, outermost first; biases are too small to count."""
        outer = {"token_embd.weight": (self.vocabulary, self.width), "output_norm.weight": (self.width,)}
        if not self.tied:
            outer["output.weight"] = (self.vocabulary, self.width)
        for i in range(self.layers):
            outer |= {f"blk.{i}.{name}.weight": shape for name, shape in self._layer().items()}
        return outer

    def _layer(self) -> dict[str, tuple[int, ...]]:
        width, ffn = self.width, self.ffn
        return {
            "attn_norm": (width,),
            "attn_q": (self.heads_width, width),
            "attn_k": (self.kv_width, width),
            "attn_v": (self.kv_width, width),
            "attn_output": (width, self.heads_width),
            "ffn_norm": (width,),
            "ffn_gate": (ffn, width),
            "ffn_up": (ffn, width),
            "ffn_down": (width, ffn),
        }

    def metadata(self) -> dict[str, object]:
        return {
            "general.architecture": self.arch,
            f"{self.arch}.block_count": self.layers,
            f"{self.arch}.attention.head_count": self.heads[0],
            f"{self.arch}.attention.head_count_kv": self.heads[1],
        }


MODELS = (
    Shape("Llama 1 and 2, 7B", "llama", 32, 4096, 11008, (32, 32), 4096, 4096, 32000),
    Shape("Mistral 7B", "llama", 32, 4096, 14336, (32, 8), 4096, 1024, 32000),
    Shape("Llama 3.1 8B", "llama", 32, 4096, 14336, (32, 8), 4096, 1024, 128256),
    Shape("Llama 3.1 70B", "llama", 80, 8192, 28672, (64, 8), 8192, 1024, 128256),
    Shape("Llama 3.2 1B", "llama", 16, 2048, 8192, (32, 8), 2048, 512, 128256, tied=True),
    Shape("Qwen2.5 7B", "qwen2", 28, 3584, 18944, (28, 4), 3584, 512, 152064),
    Shape("Qwen3 0.6B", "qwen3", 28, 1024, 3072, (16, 8), 2048, 1024, 151936, tied=True),
    Shape("SmolLM2 135M", "llama", 30, 576, 1536, (9, 3), 576, 192, 49152, tied=True),
)


def bits_per_weight(model: Shape, level: str) -> float:
    """Over all tensors, norms included, as llama-quantize prints it ("BPW")."""
    shapes = model.tensors()
    types, _ = tensor_types(model.metadata(), shapes, type_settings(level))
    bits = weights = 0
    for name, shape in shapes.items():
        elements, size = block(types[name])
        weights += math.prod(shape)
        bits += 8 * math.prod(shape) // elements * size
    return bits / weights


if __name__ == "__main__":
    for level in LEVELS:
        print(f"{level:8}" + "".join(f"{bits_per_weight(model, level):8.4f}" for model in MODELS))
