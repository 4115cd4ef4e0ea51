"""What the planner reckons with and answers with: plain values. Bytes are bytes, rates tokens a second."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Format = Literal["mlx", "gguf"]
Verdict = Literal["fits", "tight", "no"]
CONTEXT_TOKENS = 8192  # of a chat, where nobody asks for another


@dataclass(frozen=True)
class Level:
    """One way to store a model.

    name: 'bf16', '4-bit', 'mxfp4', 'Q4_K_M'. options: what `convert` is given for it, () for a model as it is.
    nbytes: of all tensors, as written. loaded_bytes: of those in memory once the model is loaded. largest_bytes: the
    largest single array. token_bytes: weight bytes read for one decoded token: of an untied input embedding no more
    than a row, of experts only those that are asked. size: weights. header_bytes: what the files hold beside tensors,
    about.
    """

    name: str
    format: Format
    options: tuple[str, ...]
    nbytes: int
    loaded_bytes: int
    largest_bytes: int
    token_bytes: int
    size: int
    header_bytes: int = 0
    remarks: tuple[str, ...] = ()

    @property
    def bpw(self) -> float:
        """Bits per weight over all that is written."""
        return 8 * self.nbytes / self.size

    @property
    def key(self) -> str:
        """What names it on the command line and in JSON: 'mlx 4-bit', 'gguf Q4_K_M'."""
        return f"{self.format} {self.name}"


@dataclass(frozen=True)
class Work:
    """What a token costs whatever the level.

    active_weights: weights that multiply one token (active experts alone; the output head counts, an input embedding
    does not). head_weights: the output head's part of them, which of a prompt multiplies the last token alone.
    attention_flops: multiply-adds times two for one token and one position of context, all layers.
    """

    layers: int
    moe: bool
    active_weights: int
    attention_flops: int
    head_weights: int = 0


@dataclass(frozen=True)
class Asked:
    """What a run would be. kv_bits: None keeps keys and values in 16 bits; chunk_tokens: of the prompt, fed at once."""

    context_tokens: int
    kv_bits: int | None
    chunk_tokens: int


@dataclass(frozen=True)
class Need:
    """Bytes of a run whose prompt fills `context_tokens`, prefilled in chunks of `chunk_tokens`.

    largest_buffer_bytes: the largest single allocation: of the weights, of one layer's keys or values, or of scores.
    """

    context_tokens: int
    chunk_tokens: int
    weight_bytes: int
    cache_bytes: int
    scratch_bytes: int
    largest_buffer_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.cache_bytes + self.scratch_bytes


@dataclass(frozen=True)
class Range:
    """A prediction: `likely`, and what measured values stay within at least four times of five."""

    low: float
    likely: float
    high: float


@dataclass(frozen=True)
class Speed:
    """decode: (depth in tokens, tok/s), from an empty cache to the context's end. prefill tok/s and ttft seconds for a
    prompt of `prompt_tokens`. engine: what the constants stand for, with its versions, or 'calibrated on this machine'.
    """

    decode: tuple[tuple[int, Range], ...]
    prompt_tokens: int
    prefill: Range
    ttft_s: Range
    engine: str


@dataclass(frozen=True)
class Row:
    """One level on one machine. longest_float, longest_8bit: tokens of the longest context that fits with keys and
    values in 16 and in 8 bits, 0 where not even one does; None for 8 bits where no layer's cache can be kept so.
    speed: None where the machine's bandwidth is not known.
    """

    level: Level
    need: Need
    verdict: Verdict
    longest_float: int
    longest_8bit: int | None
    speed: Speed | None
    advice: tuple[str, ...] = ()
