"""How fast a model will be: decode bound by bandwidth and by small kernels, prefill by arithmetic.

    decode s/token  = (read**3 + unpack**3)**(1/3) + small
        read        = (weight bytes + cache bytes) / (efficiency * bandwidth)
        unpack      = active weights / (weights per second and core * cores): quantized weights on M1 and M2 alone,
                      in llama.cpp; the GPU unpacks while it waits for memory, so the slower of the two is what counts
        small       = layers * layer_s + expert layers * expert_layer_s + recurrent layers * recurrent_layer_s,
                      longer by `generation_ratio` for each generation before the M5
    prefill s       = flops / (flops per second and core * cores) + chunks * layers * chunk_layer_s

The constants are in speed.json, written by benchmarks/fit_speed.py from published measurements; that script calls the
functions below, so that what is fitted is what is answered.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mlxquant.fit.cache import Cache
from mlxquant.fit.calibration import Own, Trial
from mlxquant.fit.values import Level, Range, Speed, Work
from mlxquant.machine import Machine
from mlxquant.macs import rows_of

NEWEST = 5  # the generation whose small kernels are taken as 1, and the first with tensor units
# Half a range's least width, in log(tok/s): one time in ten the same thing, measured again, is 4 % off its median.
LEAST_WIDTH = 0.06
EXPANDED_SHARE = 0.8  # of the working set that expanded weights may take: run/model.py
FLOAT_BITS = 15  # a weight of as many bits is not unpacked
BOTH = 3  # the exponent that joins two things which overlap: 1 would add them, infinity take the slower


@dataclass(frozen=True)
class Chip:
    """What speed depends on. generation: 1 for M1. known: published speeds of this engine on it went into the fit."""

    generation: int
    cores: int
    bandwidth_bytes_per_s: float
    known: bool = True


@dataclass(frozen=True)
class Load:
    """What one decoded token costs. blocks: 'float', 'simple' (Q4_0, Q8_0, MXFP4, affine) or 'super' (K- and I-quants).

    prompt_weights: those that multiply every token of a prompt. recurrent: layers that keep a state (linear attention,
    state spaces).
    """

    weight_bytes: float
    cache_bytes: float
    active_weights: int
    prompt_weights: float
    attention_flops: int
    layers: int
    recurrent: int
    moe: bool
    blocks: str


@dataclass(frozen=True)
class Constants:
    """Of one engine. Seconds; *_rate: weights unpacked a second and core; *_flops: per core of an M1."""

    engine: str
    efficiency: float
    layer_s: float
    expert_layer_s: float
    recurrent_layer_s: float
    generation_ratio: float
    simple_rate: float | None
    super_rate: float | None
    prefill_flops: float
    prefill_ratio: float
    tensor_ratio: float
    expert_flops_ratio: float
    chunk_tokens: int
    chunk_layer_s: float
    expert_chunk_layer_s: float
    decode_spread: dict[str, float]
    prefill_spread: dict[str, float]
    unseen: dict[str, float]
    chips: tuple[str, ...]

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Constants:
        return cls(**{**found, "chips": tuple(found["chips"])})


@cache
def constants(engine: str) -> Constants:
    """Of 'mlx' or 'gguf', from speed.json."""
    found = json.loads(Path(__file__).with_name("speed.json").read_text(encoding="utf-8"))
    return Constants.from_json(found["engines"][engine])


def read_s(at: Constants, load: Load, chip: Chip) -> float:
    return (load.weight_bytes + load.cache_bytes) / (at.efficiency * chip.bandwidth_bytes_per_s)


def decode_s(at: Constants, load: Load, chip: Chip) -> float:
    """Seconds for one token."""
    rate = {"simple": at.simple_rate, "super": at.super_rate}.get(load.blocks) if chip.generation < 3 else None
    read = read_s(at, load, chip)
    unpack = load.active_weights / (rate * chip.cores) if rate else 0.0
    small = load.layers * (at.layer_s + at.expert_layer_s * load.moe) + load.recurrent * at.recurrent_layer_s
    return float((read**BOTH + unpack**BOTH) ** (1 / BOTH) + small * _older(at.generation_ratio, chip))


def prompt_flops(load: Load, tokens: int) -> float:
    """Multiply-adds times two of a prompt in an empty cache: each token attends to half of it in the mean."""
    return tokens * (2 * load.prompt_weights + load.attention_flops * tokens / 2)


def prompt_weights(engine: str, active: int, head: int, layers: int, shared: int) -> float:
    """Weights that multiply every token of a prompt: the output head multiplies the last alone.

    mlx-lm evaluates the caches alone, so that the last layers, where they share the cache of others, never run.
    """
    return (active - head) * ((layers - shared) / layers if engine == "mlx" else 1)


def prefill_s(at: Constants, load: Load, chip: Chip, tokens: int) -> float:
    """Seconds for a prompt of so many tokens in an empty cache."""
    flops = prompt_flops(load, tokens)
    rate = at.prefill_flops * chip.cores * at.prefill_ratio ** (min(chip.generation, NEWEST - 1) - 1)
    rate *= (at.tensor_ratio if chip.generation >= NEWEST else 1) * (at.expert_flops_ratio if load.moe else 1)
    layer = at.chunk_layer_s + at.expert_chunk_layer_s * load.moe
    return float(flops / rate + math.ceil(tokens / at.chunk_tokens) * load.layers * layer)


def decode_width(at: Constants, load: Load, chip: Chip) -> float:
    """Half the range of log(tok/s). Wider the more of the time is not reading weights: that part is known less well."""
    total = decode_s(at, load, chip)
    weights = load.weight_bytes / (at.efficiency * chip.bandwidth_bytes_per_s) / total
    width = at.decode_spread["moe" if load.moe else "dense"] * (at.decode_spread["floor"] + 1 - weights)
    return max(LEAST_WIDTH, width) * (1 if chip.known else at.unseen["decode"])


def prefill_width(at: Constants, load: Load, chip: Chip) -> float:
    return at.prefill_spread["moe" if load.moe else "dense"] * (1 if chip.known else at.unseen["prefill"])


def _older(ratio: float, chip: Chip) -> float:
    return float(ratio ** (NEWEST - min(chip.generation, NEWEST)))


def speed(
    level: Level,
    work: Work,
    cache: Cache,
    machine: Machine,
    depths: tuple[int, ...],
    prompt_tokens: int,
    own: Own | None = None,
) -> Speed | None:
    """Decode and prefill of `level`. None where the machine's bandwidth is not known and it was not calibrated.

    own: this machine's constants, of MLX: they do not speak for llama.cpp, which reads GGUF files.
    """
    at = constants(level.format)
    chips = _chips(machine, at)
    loads = [_load(level, work, cache, machine, depth) for depth in depths]
    measured = own if own is not None and level.format == "mlx" else None
    if not chips and not (measured and measured.alone):
        return None
    decode = [_decode(at, load, chips, measured) for load in loads]
    seconds = _prefill(at, _load(level, work, cache, machine, prompt_tokens), chips, prompt_tokens, measured)
    return Speed(
        tuple(zip(depths, decode, strict=True)),
        prompt_tokens,
        _inverse(seconds, prompt_tokens),
        seconds,
        f"calibrated on this machine: {measured.engine}" if measured else at.engine,
    )


def decode_bytes(level: Level, work: Work, machine: Machine) -> int:
    """Weight bytes read for one token. Without a GPU mlxquant expands all weights to float32 where they fit
    (run/expand.py), whatever the level.
    """
    expanded = level.format == "mlx" and machine.device == "cpu"
    fits = 4 * level.size <= EXPANDED_SHARE * machine.working_set_bytes
    return 4 * work.active_weights if expanded and fits else level.token_bytes


def trial_of(
    level: Level, work: Work, cache: Cache, machine: Machine, *, model: str, depth_tokens: int, prompt_tokens: int,
    decode_tok_s: float, prefill_tok_s: float, bandwidth_bytes_per_s: float, date: str, versions: str,
) -> Trial:  # fmt: skip
    """What `keep` takes: one case that was timed by mlxquant. depth_tokens: in the cache halfway through decoding.

    bandwidth_bytes_per_s: published, or measured where that is None (measure/traffic.py).
    """
    at, load = constants("mlx"), _load(level, work, cache, machine, depth_tokens)
    chips = _chips(machine, at)
    return Trial(
        "mlxquant", model, load.weight_bytes, load.cache_bytes, load.layers, load.moe, load.active_weights,
        prompt_tokens, prompt_flops(load, prompt_tokens), 1 / decode_tok_s, prefill_tok_s, bandwidth_bytes_per_s, date,
        versions, decode_s(at, load, chips[0]) if chips else None,
    )  # fmt: skip


def _load(level: Level, work: Work, cache: Cache, machine: Machine, depth: int) -> Load:
    recurrent, shared = (
        sum(number for kind, number, _ in cache.layers if kind in kinds) for kinds in (("linear", "ssm"), ("shared",))
    )
    of_prompt = prompt_weights(level.format, work.active_weights, work.head_weights, work.layers, shared)
    return Load(
        decode_bytes(level, work, machine), cache.read_bytes(depth), work.active_weights, of_prompt,
        work.attention_flops, work.layers, recurrent, work.moe,
        blocks_of(level.name, 8 * level.token_bytes / max(1, work.active_weights)),
    )  # fmt: skip


def blocks_of(name: str, bits: float) -> str:
    """How the weights are packed, by the level's name and its bits a weight."""
    if bits >= FLOAT_BITS:
        return "float"
    return "super" if "_K" in name or name.startswith(("IQ", "TQ")) else "simple"


def _chips(machine: Machine, at: Constants) -> tuple[Chip, ...]:
    """The machine; one for each count of cores that it may have, the smallest first, where that is not known."""
    rate, generation = machine.bandwidth_bytes_per_s, _generation(machine)
    name = machine.chip.removeprefix("Apple ").strip()
    known = name in at.chips and generation is not None and generation <= NEWEST
    sold = {count for row in rows_of(name) for count in row.gpu_cores if row.bandwidth_bytes_per_s == rate}
    counts = [machine.gpu_cores] if machine.gpu_cores else sorted(sold)
    if rate is None or generation is None:
        return ()
    return tuple(Chip(generation, count, rate, known) for count in counts)


def _generation(machine: Machine) -> int | None:
    """A18 Pro has the GPU of the M4; M6 is reckoned as M5, with the range of a chip that was not seen."""
    found = machine.generation
    if found is None:
        return None
    return max(1, int(found[1:]) - (14 if found[0] == "A" else 0))


def _decode(at: Constants, load: Load, chips: tuple[Chip, ...], own: Own | None) -> Range:
    """tok/s. `likely` is that of the smallest GPU that the machine may have."""
    if own is not None:
        seconds = own.decode_s(load.weight_bytes + load.cache_bytes, load.layers)
        if own.scale is not None and chips:
            seconds = own.scale * decode_s(at, load, chips[0])
        return _spread(1 / seconds, own.width)
    ends = [_spread(1 / decode_s(at, load, chip), decode_width(at, load, chip)) for chip in chips]
    return Range(ends[0].low, ends[0].likely, max(end.high for end in ends))


def _prefill(at: Constants, load: Load, chips: tuple[Chip, ...], tokens: int, own: Own | None) -> Range:
    """Seconds to the first token."""
    if own is not None:
        return _spread(prompt_flops(load, tokens) / own.prefill_flops, own.prefill_width)
    ends = [_spread(prefill_s(at, load, chip, tokens), prefill_width(at, load, chip)) for chip in chips]
    return Range(min(end.low for end in ends), ends[0].likely, ends[0].high)


def _spread(likely: float, width: float) -> Range:
    return Range(likely * math.exp(-width), likely, likely * math.exp(width))


def _inverse(seconds: Range, tokens: int) -> Range:
    return Range(tokens / seconds.high, tokens / seconds.likely, tokens / seconds.low)
