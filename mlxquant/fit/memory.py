"""Will it fit: weights, cache, scratch and the largest single buffer against what a machine gives.

MLX levels are reckoned as mlx-lm runs them, GGUF levels as llama.cpp does (llamacpp.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from mlxquant.families.shape import ModelShape
from mlxquant.fit import llamacpp
from mlxquant.fit.activations import Activations, activations
from mlxquant.fit.cache import Cache, cache_of
from mlxquant.fit.scratch import Prefill
from mlxquant.fit.values import Asked, Level, Need, Verdict
from mlxquant.machine import Machine
from mlxquant.units import GIB, MIB, format_bytes

# MLX collects garbage from 0.95 of the working set (allocator.cpp, gc_limit); mlx-lm warns above 0.9 (generate.py).
FILL, EASE = 0.95, 0.9
# Python, tokenizer, and freed buffers that MLX keeps until the next clear_cache: beside get_peak_memory, but in RAM.
PROCESS_BYTES = 500_000_000
# What those leave to the system who raise the limit by hand: a fifth, or 5 GiB (exo's configure_mlx.sh).
SYSTEM_SHARE, SYSTEM_BYTES = 0.2, 5 * GIB
SMALLER_CHUNKS = (1024, 512, 256)


def cache_on(machine: Machine, shape: ModelShape, kv_bits: int | None = None) -> Cache:
    """mlx-lm's cache there: on a CPU models run in float32 (run/expand.py), and keys and values with them."""
    return cache_of(shape, kv_bits=kv_bits, item_bytes=2 if _has_gpu(machine) else 4)


def need(
    level: Level,
    cache: Cache,
    shape: ModelShape,
    machine: Machine,
    context_tokens: int,
    chunk_tokens: int,
) -> Need:
    """Bytes of a run whose prompt fills `context_tokens`, and its largest single buffer. `cache`: of `shape`, as
    cache_of gives it. Of a GGUF level chunk_tokens is llama.cpp's own, 512."""
    if level.format == "gguf":
        return llamacpp.need(level, cache, shape, context_tokens)
    made = activations(shape)
    found = mlx_need(level.loaded_bytes, cache, made, machine, context_tokens, chunk_tokens)
    return replace(found, largest_buffer_bytes=max(found.largest_buffer_bytes, level.largest_bytes))


def mlx_need(
    weight_bytes: int, cache: Cache, made: Activations, machine: Machine, context_tokens: int, chunk_tokens: int
) -> Need:
    """As `need`, in MLX. Of the largest buffer without the weights, which are not known one by one."""
    # A cache shortened by --max-kv-size is a window that the config knows nothing of.
    window = next((growth.window for kind, _, growth in cache.layers if kind == "rotating"), None)
    quantized = any(kind == "quantized" for kind, *_ in cache.layers)
    prefill = Prefill(made.within(window), context_tokens, chunk_tokens, machine, weight_bytes, quantized)
    return Need(
        context_tokens,
        chunk_tokens,
        weight_bytes,
        cache.peak_bytes(context_tokens, 1, chunk_tokens),
        prefill.scratch_bytes(cache.bytes_per_token),
        max(cache.largest_bytes(context_tokens, chunk_tokens), prefill.largest_scores_bytes),
    )


def limit_bytes(machine: Machine) -> int:
    """What a model may take: 0.95 of the working set, and on a Mac, where that was raised by hand, no more than RAM
    less what the system and this process keep."""
    limit = int(FILL * machine.working_set_bytes)
    return min(limit, machine.memory_bytes - _system_bytes(machine) - PROCESS_BYTES) if _has_gpu(machine) else limit


def verdict(needed: Need, machine: Machine) -> Verdict:
    """'fits' up to 0.9 of the working set, 'tight' up to 0.95, 'no' beyond, or where one buffer is too large."""
    limit = limit_bytes(machine)
    if needed.total_bytes > limit or needed.largest_buffer_bytes > machine.max_buffer_bytes:
        return "no"
    return "fits" if needed.total_bytes <= limit * EASE / FILL else "tight"


def longest_context(
    level: Level, cache: Cache, shape: ModelShape, machine: Machine, chunk_tokens: int, ceiling_tokens: int
) -> int:
    """The most tokens, at most `ceiling_tokens`, that are not a 'no'; 0 where not even one is."""

    def fits(tokens: int) -> bool:
        return verdict(need(level, cache, shape, machine, tokens, chunk_tokens), machine) != "no"

    return longest(fits, ceiling_tokens)


def longest(fits: Callable[[int], bool], ceiling_tokens: int) -> int:
    """By bisection: the largest number that fits, 0 when not even 1 does."""
    if fits(ceiling_tokens):
        return ceiling_tokens
    low, high = 0, ceiling_tokens - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def advice(level: Level, now: Need, cache: Cache, shape: ModelShape, machine: Machine, asked: Asked) -> list[str]:
    """What helps a level that does not fit at ease, one line each: only what helps by the numbers. Of one that does,
    whether it would not under an older macOS. `now`: what it needs as asked for; `cache`: of that run."""
    older = _older_macos(now, machine)
    if verdict(now, machine) == "fits":
        return [older] if older else []
    lines = [
        _one_buffer(now, machine),
        _smaller_chunk(now, level, cache, shape, machine, asked),
        _kv_bits(now, level, cache, shape, machine, asked),
        _shorter_context(level, cache, shape, machine, asked),
        _raised_limit(now, machine),
        _smaller_level(now, machine),
        older,
    ]
    return [line for line in lines if line]


def _one_buffer(now: Need, machine: Machine) -> str:
    """MLX raises where one allocation is larger, whatever is free; a raised limit does not change it."""
    if now.largest_buffer_bytes <= machine.max_buffer_bytes:
        return ""
    found, most = format_bytes(now.largest_buffer_bytes), format_bytes(machine.max_buffer_bytes)
    return f"one buffer takes {found}, and no buffer there may be larger than {most}"


def _smaller_chunk(now: Need, level: Level, cache: Cache, shape: ModelShape, machine: Machine, asked: Asked) -> str:
    if level.format == "gguf":
        return ""
    best = _best(now, machine, _in_chunks(level, cache, shape, machine, asked)[1:])
    if best is None or now.total_bytes - best.total_bytes < now.total_bytes // 100:
        return ""
    saved = format_bytes(now.total_bytes - best.total_bytes)
    return f"--prefill-step {best.chunk_tokens} saves {saved}{_then(best, machine)}"


def _kv_bits(now: Need, level: Level, cache: Cache, shape: ModelShape, machine: Machine, asked: Asked) -> str:
    """With a smaller chunk where that is what makes it better: attention over quantized keys makes scores."""
    if asked.kv_bits:
        return ""
    if level.format == "mlx" and not cache.quantizable:
        return "--kv-bits 8 does not help: no layer's cache can be quantized"
    small = _in_chunks(level, cache_on(machine, shape, 8), shape, machine, asked)
    best = _best(now, machine, small[:1]) or _best(now, machine, small[1:])
    if best is not None and now.total_bytes - best.total_bytes > now.total_bytes // 100:
        chunk = "" if best.chunk_tokens == now.chunk_tokens else f" --prefill-step {best.chunk_tokens}"
        saved = format_bytes(now.total_bytes - best.total_bytes)
        return f"--kv-bits 8{chunk} saves {saved}{_then(best, machine)}"
    if small[0].total_bytes < now.total_bytes:
        return ""
    less = format_bytes(now.cache_bytes - small[0].cache_bytes)
    return f"--kv-bits 8 does not help: {less} less cache, but attention is no longer fused and makes scores"


def _in_chunks(level: Level, cache: Cache, shape: ModelShape, machine: Machine, asked: Asked) -> list[Need]:
    """The run as it was asked for, then in smaller chunks."""
    smaller = [chunk for chunk in SMALLER_CHUNKS if chunk < min(asked.chunk_tokens, asked.context_tokens)]
    chunks = [asked.chunk_tokens, *(smaller if level.format == "mlx" else ())]
    return [need(level, cache, shape, machine, asked.context_tokens, chunk) for chunk in chunks]


def _best(now: Need, machine: Machine, needs: Sequence[Need]) -> Need | None:
    """The first with a better verdict, or else the one that saves most; None where none saves anything."""
    less = [n for n in needs if n.total_bytes < now.total_bytes]
    better = [n for n in less if _rank(n, machine) > _rank(now, machine)]
    return better[0] if better else min(less, key=lambda n: n.total_bytes, default=None)


def _shorter_context(level: Level, cache: Cache, shape: ModelShape, machine: Machine, asked: Asked) -> str:
    found = longest_context(level, cache, shape, machine, asked.chunk_tokens, asked.context_tokens)
    return f"--context {found} is the longest that fits" if 0 < found < asked.context_tokens else ""


def _raised_limit(now: Need, machine: Machine) -> str:
    """Metal's own limit, where it is what binds and RAM has more. Enough for a fit at ease, if there is as much."""
    if not _has_gpu(machine):
        return ""
    mib = min(int(now.total_bytes / EASE) // MIB + 1, (machine.memory_bytes - _system_bytes(machine)) // MIB)
    raised = replace(machine, working_set_bytes=mib * MIB)
    if _rank(now, raised) <= _rank(now, machine):
        return ""
    kept = format_bytes(machine.memory_bytes - mib * MIB)
    return (
        f"sudo sysctl iogpu.wired_limit_mb={mib} lets the GPU have {format_bytes(mib * MIB)} and leaves {kept} to the "
        f"system{_then(now, raised)}; macOS may swap or panic, and it is lost at reboot"
    )


def _smaller_level(now: Need, machine: Machine) -> str:
    room = limit_bytes(machine) - now.cache_bytes - now.scratch_bytes
    if now.total_bytes <= limit_bytes(machine) or room <= 0:
        return ""
    return f"a level of at most {format_bytes(room)} of weights fits with this context"


def _older_macos(now: Need, machine: Machine) -> str:
    if machine.older_working_set_bytes is None:
        return ""
    older = machine.with_older_macos()
    there, here = verdict(now, older), verdict(now, machine)
    return f"under {older.system} or before: {_VERDICTS[there]}" if there != here else ""


_VERDICTS: dict[Verdict, str] = {"fits": "it fits", "tight": "it is tight", "no": "it does not fit"}
_RANKS: dict[Verdict, int] = {"no": 0, "tight": 1, "fits": 2}


def _rank(needed: Need, machine: Machine) -> int:
    return _RANKS[verdict(needed, machine)]


def _then(needed: Need, machine: Machine) -> str:
    words = {"fits": ": then it fits", "tight": ": then it is tight", "no": ", not enough alone"}
    return words[verdict(needed, machine)]


def _has_gpu(machine: Machine) -> bool:
    return machine.device == "gpu"


def _system_bytes(machine: Machine) -> int:
    return int(min(SYSTEM_SHARE * machine.memory_bytes, SYSTEM_BYTES))
