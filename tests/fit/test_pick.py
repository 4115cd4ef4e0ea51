"""The decision, over rows that are made up: which level, why, and what no change of memory or context may do to it."""

from __future__ import annotations

import shlex
from dataclasses import replace
from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxquant.errors import UsageError
from mlxquant.fit.decision import USES, chain_of, tok_s
from mlxquant.fit.divergence import divergence
from mlxquant.fit.levels import LEVELS
from mlxquant.fit.memory import limit_bytes
from mlxquant.fit.pick import Pick, command, output_name, pick
from mlxquant.fit.values import Level, Need, Range, Row, Speed
from mlxquant.machine import Machine, described
from tests.fit.test_divergence import level as named

# Bits per weight of an 8B model, about; docs/quality.md.
BPW = {"8-bit": 8.5, "6-bit": 6.5, "5-bit": 5.6, "4-bit": 4.7, "3-bit": 3.9, "2-bit": 2.9, "mxfp4": 4.5,
       "Q8_0": 8.5, "Q6_K": 6.56, "Q5_K_M": 5.7, "Q4_K_M": 4.89, "Q4_K_S": 4.67, "IQ4_XS": 4.46,
       "Q3_K_M": 4.0, "Q2_K": 3.16}  # fmt: skip
KV_BYTES = 131072  # a token, Llama-3.1-8B
GB = 10**9


def levels(size: int = 8 * GB) -> list[Level]:
    """The usual ones, as fit/levels.py gives them: the model as it is first."""
    whole = Level("bf16", "mlx", (), 2 * size, 2 * size, size // 8, 2 * size, size)
    return [whole, *(named(key.split(" ", 1)[1], BPW[key.split(" ", 1)[1]], size) for key in LEVELS)]


def rows(
    limit: float, context: int = 8192, bandwidth: float | None = 400 * GB, size: int = 8 * GB, slack: float = 0.95
) -> list[Row]:
    """What memory and speed would make of them, in a few lines: tight above `slack` of the limit."""
    found = []
    for level in levels(size):
        need = Need(context, 2048, level.loaded_bytes, KV_BYTES * context, 7 * GB // 10, GB)
        verdict = "fits" if need.total_bytes <= slack * limit else "tight" if need.total_bytes <= limit else "no"
        free = limit - level.loaded_bytes - need.scratch_bytes
        longest = max(0, int(free / KV_BYTES)), max(0, int(free / KV_BYTES * 16 / 8.5))
        found.append(Row(level, need, verdict, *longest, speed_of(level, context, bandwidth)))
    return found


def speed_of(level: Level, context: int, bandwidth: float | None) -> Speed | None:
    if bandwidth is None:
        return None

    def at(depth: int) -> tuple[int, Range]:
        likely = 0.85 * bandwidth / (level.token_bytes + KV_BYTES * depth)
        return depth, Range(0.9 * likely, likely, 1.1 * likely)

    one = Range(90, 100, 110)
    return Speed((at(0), at(context)), 2048, one, one, "made up")


MAC = described("M2 Max 64GB")


def mac(limit: float) -> Machine:
    """On which a model may take so many bytes."""
    return replace(MAC, memory_bytes=2**40, working_set_bytes=ceil(limit / 0.95))


def chosen(use: str, limit_gb: float, form: str = "mlx", **others: float) -> str | None:
    limit = limit_gb * GB
    found = pick(rows(limit, **others), use, mac(limit), int(others.get("context", 8192)), form=form)
    return found.row.level.name if found.row else None


# An 8B model of 8k context: 5.2 GB at 4 bits with cache and scratch 6.5; 5 bits 7.4; 6 bits 8.3; 8 bits 10.3.
@pytest.mark.parametrize(
    ("use", "limit_gb", "others", "expected"),
    [
        # Enough memory: what is enough for the use.
        ("chat", 14, {}, "5-bit"),
        ("writing", 14, {}, "6-bit"),
        ("code", 14, {}, "6-bit"),
        ("extraction", 14, {}, "8-bit"),
        ("chat", 14, {"form": "gguf"}, "Q5_K_M"),
        ("code", 14, {"form": "gguf"}, "Q6_K"),
        ("extraction", 14, {"form": "gguf"}, "Q8_0"),
        # Plenty: more, up to 8 bits, as long as half of it and twice the speed are left.
        ("chat", 16.4, {}, "5-bit"),
        ("chat", 16.6, {}, "6-bit"),
        ("chat", 20.6, {}, "8-bit"),
        ("chat", 48, {}, "8-bit"),
        ("chat", 48, {"form": "gguf"}, "Q8_0"),
        ("chat", 48, {"bandwidth": 200 * GB}, "6-bit"),
        ("code", 48, {"bandwidth": 100 * GB}, "6-bit"),
        ("code", 48, {"bandwidth": 150 * GB}, "8-bit"),
        # Comfortable: the largest that fits.
        ("chat", 7.3, {}, "4-bit"),
        ("code", 8.0, {}, "5-bit"),
        ("extraction", 9.5, {}, "6-bit"),
        ("chat", 7.3, {"form": "gguf"}, "Q4_K_M"),
        # Tight: below what is good only where nothing better fits; a good one with little left before a bad one.
        ("code", 7.3, {}, "4-bit"),
        ("chat", 6.6, {}, "4-bit"),
        ("chat", 6.0, {"form": "gguf"}, "Q3_K_M"),
        ("chat", 7.0, {"form": "gguf", "slack": 0.85}, "IQ4_XS"),
        # Nothing: 3 bits cost as much as Q2_K, and neither is ever named.
        ("chat", 6.0, {}, None),
        ("code", 6.0, {"form": "gguf"}, None),
        ("chat", 5.2, {"form": "gguf"}, None),
        # Slow: bits for speed, where someone waits; 11.5, 10.2 and 9.2 tok/s at 4, 5 and 6 bits.
        ("chat", 48, {"bandwidth": 80 * GB}, "5-bit"),
        ("chat", 48, {"bandwidth": 75 * GB}, "4-bit"),
        ("chat", 48, {"bandwidth": 10 * GB}, "4-bit"),
        ("writing", 48, {"bandwidth": 80 * GB}, "5-bit"),
        ("code", 48, {"bandwidth": 80 * GB}, "6-bit"),
        ("code", 48, {"bandwidth": 10 * GB}, "5-bit"),
        ("chat", 48, {"bandwidth": None}, "5-bit"),
        # Both formats: the smallest that is enough, then the closest that fits.
        ("chat", 14, {"form": "either"}, "5-bit"),
        ("chat", 7.3, {"form": "either"}, "Q4_K_M"),
        # A small model loses more at every level, so that it is given more bits.
        ("chat", 4, {"size": 6 * GB // 10}, "8-bit"),
        ("chat", 4, {"size": 6 * GB // 10, "form": "gguf"}, "Q6_K"),
    ],
)
def test_decision(use, limit_gb, others, expected):
    assert chosen(use, limit_gb, **others) == expected


sizes = st.integers(5 * 10**8, 80 * GB)
limits = st.floats(1 * GB, 200 * GB)
contexts = st.integers(1, 200_000)
bandwidths = st.one_of(st.none(), st.floats(50 * GB, 1000 * GB))
uses, forms = st.sampled_from(sorted(USES)), st.sampled_from(["mlx", "gguf", "either"])


slacks = st.floats(0.6, 1)


def one(
    use: str, form: str, limit: float, context: int, bandwidth: float | None, size: int, slack: float = 0.95
) -> Pick:
    return pick(rows(limit, context, bandwidth, size, slack), use, mac(limit), context, form=form)


@settings(deadline=None, max_examples=300)
@given(uses, forms, limits, contexts, bandwidths, sizes)
def test_what_is_picked_fits_and_is_good_enough(use, form, limit, context, bandwidth, size):
    found = one(use, form, limit, context, bandwidth, size)
    assert len(found.why) <= 3
    if found.row is None:
        offered = [r for r in rows(limit, context, bandwidth, size) if form in ("either", r.level.format)]
        costs = [divergence(r.level) for r in offered if r.verdict != "no"]
        assert all(cost is None or cost.kl > USES[use].worst for cost in costs)
        return
    assert found.row.verdict != "no"
    assert found.row.need.total_bytes <= limit
    assert divergence(found.row.level).kl <= USES[use].worst


@settings(deadline=None, max_examples=300)
@given(uses, forms, limits, st.floats(1, 4), contexts, bandwidths, sizes, slacks)
def test_more_memory_never_costs_divergence(use, form, limit, more, context, bandwidth, size, slack):
    before, after = (one(use, form, limit * factor, context, bandwidth, size, slack) for factor in (1, more))
    if before.row is not None:
        assert after.cost.kl <= before.cost.kl


@settings(deadline=None, max_examples=300)
@given(uses, forms, limits, contexts, st.floats(1, 8), bandwidths, sizes, slacks)
def test_a_longer_context_never_picks_a_larger_level(use, form, limit, context, longer, bandwidth, size, slack):
    before, after = (one(use, form, limit, int(context * factor), bandwidth, size, slack) for factor in (1, longer))
    if after.row is not None:
        assert after.row.level.nbytes <= before.row.level.nbytes


@settings(deadline=None, max_examples=300)
@given(forms, limits, contexts, sizes)
def test_who_tolerates_less_is_given_no_worse(form, limit, context, size):
    costs = [one(use, form, limit, context, None, size).cost for use in ("chat", "code", "extraction")]
    known = [cost.kl for cost in costs if cost]
    assert known == sorted(known, reverse=True)


def test_levels_that_another_one_beats_are_never_in_the_running():
    """At the same size GGUF's 4 bits are closer to the model than MLX's, so that MLX's are left out of `either`."""
    chain = [choice.row.level.key for choice in chain_of(rows(48 * GB), USES["chat"])]
    assert "gguf Q4_K_M" in chain
    assert "mlx 4-bit" not in chain
    assert "mlx mxfp4" not in chain


def test_speed_counts_at_the_end_of_the_context():
    (row,) = [r for r in rows(48 * GB, 65536) if r.level.name == "4-bit"]
    assert tok_s(row, 65536) == row.speed.decode[1][1].likely
    assert tok_s(row, 65536) < tok_s(row, 0) == row.speed.decode[0][1].likely


def test_why_says_what_fits_what_it_costs_and_what_its_neighbours_would_change():
    found = pick(rows(8.0 * GB), "code", MAC, 8192, name="org/Llama 8B")
    fits, costs, neighbours = found.why
    assert fits.startswith("mlx 5-bit takes 7.37 GB of the ")
    assert "cache 1.07 GB at 8,192 tokens" in fits
    assert "is 20.2 ± 2.5 milli-nats" in costs
    assert "93 % of positions, on Qwen2.5-Coder-1.5B" in costs
    assert "tok/s" in costs
    assert "mlx 6-bit, takes 8.27 GB and does not fit" in neighbours
    assert "mlx 4-bit, saves 900 MB and diverges by 95 ± 11 milli-nats" in neighbours
    assert found.runner_up.level.key == "mlx 4-bit"
    assert found.command == "mlxquant convert 'org/Llama 8B' -o 'Llama 8B-5bit' --bits 5"
    assert found.lines()[0] == "For code: mlx 5-bit"
    assert found.lines()[-1].endswith(found.command)


def test_why_says_that_a_larger_level_is_slow_or_not_needed():
    slow = pick(rows(14 * GB, bandwidth=75 * GB), "chat", mac(14 * GB), 8192).why[2]
    assert "mlx 5-bit, writes 9.55 tok/s, less than the 10 that chat wants" in slow
    slower = pick(rows(14 * GB, bandwidth=50 * GB), "chat", mac(14 * GB), 8192).why[2]
    assert "mlx 5-bit, writes 6.37 tok/s, even further from the 10 that chat wants" in slower
    assert "closer than chat needs" in pick(rows(14 * GB), "chat", mac(14 * GB), 8192).why[2]
    assert "tok/s" not in pick(rows(48 * GB, bandwidth=None), "chat", MAC, 8192).why[1]


@pytest.mark.parametrize(("limit_gb", "use", "expected"), [(48, "chat", "plenty"), (7.3, "chat", "comfortable"),
                                                          (6.6, "chat", "tight"), (7.3, "code", "tight"),
                                                          (5.0, "chat", "none")])  # fmt: skip
def test_room(limit_gb, use, expected):
    assert pick(rows(limit_gb * GB), use, MAC, 8192).room == expected


def test_nothing_fits_names_what_would():
    small = described("M2 8GB")
    limit = limit_bytes(small)
    found = pick(rows(limit, 8192), "chat", small, 8192)
    assert found.row is None
    assert found.command == ""
    first, offers, other = found.why
    assert "mlx mxfp4, the smallest, takes 6.27 GB at 8,192 tokens" in first
    assert "a Mac with 16 GB of memory" in offers
    assert "gguf" not in offers
    assert "a model of at most" in offers
    assert other.startswith("mlx 2-bit fits, but diverges by at most 6,172 ")


def test_what_is_offered_would_fit():
    limit = 5.7 * GB
    found = pick(rows(limit, 8192), "chat", mac(limit), 8192)
    assert found.why[2].startswith("mlx 3-bit fits, but diverges by 487 ")
    (words,) = [word for word in found.why[1].split("; ") if "--context" in word]
    context = int(shlex.split(words.split("--context ")[1])[0])
    (row,) = [r for r in rows(limit, 1) if r.level.name == "mxfp4"]
    assert words.endswith("--kv-bits 8")
    assert context == row.longest_8bit > row.longest_float > 0
    again = pick(rows(limit, row.longest_float), "chat", mac(limit), row.longest_float)
    assert again.row.level.name == "mxfp4"
    (model,) = [word for word in found.why[1].split("; ") if "weights at" in word]
    weights = float(model.split("at most ")[1].split("B")[0]) * GB
    assert pick(rows(limit, 8192, size=int(0.99 * weights)), "chat", mac(limit), 8192).row.level.name == "mxfp4"


def test_the_other_format_is_named_where_it_fits():
    found = pick(rows(6.2 * GB), "chat", mac(6.2 * GB), 8192)
    assert found.row is None
    assert found.why[1].startswith("What would fit: gguf Q3_K_M, with --format gguf; ")


def test_a_quantized_model_is_taken_as_it_is():
    stored = Level("Q4_K_M", "gguf", (), 5 * GB, 5 * GB, GB, 5 * GB, 8 * GB)
    (plain, *_) = rows(48 * GB)
    row = replace(plain, level=stored, need=replace(plain.need, weight_bytes=5 * GB), verdict="fits")
    found = pick([row], "code", MAC, 8192, name="a b.gguf", kv_bits=8)
    assert found.row is row, "there is nothing in MLX"
    assert found.command == "mlxquant chat 'a b.gguf' --kv-bits 8"
    assert found.cost.how == "measured"
    repack = replace(plain, level=replace(plain.level, name="repack", options=("--recipe", "repack")), verdict="fits")
    assert pick([row, repack], "code", MAC, 8192, form="gguf").row is row
    taken_over = pick([row, repack], "code", MAC, 8192, form="mlx")
    assert taken_over.row is repack, "what the command loads is what was reckoned"
    assert taken_over.room == "comfortable", "nothing is known of what it costs"
    large = replace(plain, level=replace(stored, name="mxfp4", format="mlx"), verdict="no")  # as gpt-oss is published
    fresh = [found for found in rows(48 * GB) if found.level.format == "gguf"]
    for form in ("gguf", "either"):
        assert pick([large, *fresh], "code", MAC, 8192, form=form).row in fresh
    assert "with --format gguf" in pick([large, *fresh], "code", MAC, 8192).why[1]
    unknown = replace(row, level=replace(stored, name="MXFP4_MOE"))
    assert pick([unknown], "code", MAC, 8192).row is unknown
    nothing = pick([replace(unknown, verdict="no")], "code", MAC, 8192)
    assert nothing.row is None
    assert "weights at" not in nothing.why[1]


def test_json_is_plain():
    found = pick(rows(7.3 * GB), "chat", MAC, 8192).to_json()
    assert found["level"] == "mlx 4-bit"
    assert found["divergence"]["kl_nats"] == divergence(named("4-bit", 4.5)).kl
    assert pick(rows(GB), "chat", MAC, 8192).to_json()["level"] is None


def test_an_unknown_use():
    with pytest.raises(UsageError, match="poetry"):
        pick(rows(GB), "poetry", MAC, 8192)


@pytest.mark.parametrize(
    ("name", "key", "expected"),
    [
        ("Qwen/Qwen3-8B", "4-bit", "Qwen3-8B-4bit"),
        ("/models/Qwen3-8B/", "mxfp4", "Qwen3-8B-mxfp4"),
        ("org/x/y-BF16.gguf", "Q4_K_M", "y-BF16-Q4_K_M.gguf"),
        ("org/x", "4-bit g32 uniform", "x-4bit-g32-uniform"),
        (".", "4-bit", "model-4bit"),
    ],
)
def test_names_of_what_is_made(name, key, expected):
    assert output_name(name, named(key, 4.5)) == expected


def test_commands_are_what_convert_takes():
    words = shlex.split(command("org/it's", named("4-bit g32 uniform", 5.0)))
    assert words == ["mlxquant", "convert", "org/it's", "-o", "it's-4bit-g32-uniform", "--bits", "4",
                     "--group-size", "32", "--recipe", "uniform"]  # fmt: skip
