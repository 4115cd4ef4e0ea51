"""Shapes in words become configs that hold what was said, and as many parameters."""

from __future__ import annotations

import pytest

from mlxquant.errors import UsageError
from mlxquant.families.checkpoint import parameters
from mlxquant.families.proportions import config_of
from mlxquant.families.shape import ModelShape
from mlxquant.units import parse_count

DENSE = [(params, {}) for params in ("135M", "360M", "0.6B", "1.7B", "3B", "7B", "8B", "14B", "32B", "70B", "405B")]
MIXED = [("1B", 8), ("7B", 8), ("47B", 8), ("20B", 32), ("14B", 128), ("30B", 128), ("235B", 128), ("671B", 256)]


@pytest.mark.parametrize(("params", "mixture"), DENSE + [(params, {"experts": experts}) for params, experts in MIXED])
def test_parameters_come_out(params, mixture):
    config = config_of(parse_count(params), **mixture)
    assert parameters(config) == pytest.approx(parse_count(params), rel=0.02)
    shape = ModelShape.from_config(config)
    assert shape.heads % shape.kv_heads == 0
    assert shape.experts == mixture.get("experts", 0)


def test_what_is_given_is_kept():
    config = config_of(6_738_415_616, layers=32, hidden=4096, heads=32, kv_heads=32, ffn=11008, vocab=32000)
    assert parameters(config) == 6_738_415_616  # Llama 2 7B
    config = config_of(parse_count("7B"), layers=28, kv_heads=4, head_dim=64, vocab=50_000)
    wanted = {"num_hidden_layers": 28, "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 50_000}
    assert wanted.items() <= config.items()


@pytest.mark.parametrize(
    ("params", "given", "says"),
    [
        ("7B", {"layers": 32, "hidden": 4096, "heads": 32, "kv_heads": 32, "ffn": 11008, "vocab": 32000}, "6.74B"),
        ("100M", {"vocab": 500_000, "hidden": 1024}, "not 100M"),
        ("7B", {"heads": 30, "kv_heads": 8}, "no multiple"),
        ("7B", {"active": 2}, "--experts"),
        ("7B", {"experts": 8, "active": 9}, "--active 9"),
    ],
)
def test_contradictions_are_named(params, given, says):
    with pytest.raises(UsageError, match=says) as caught:
        config_of(parse_count(params), **given)
    assert caught.value.hint


@pytest.mark.parametrize(("text", "count"), [("7B", 7 * 10**9), ("135M", 135 * 10**6), ("1.5b", 1_500_000_000)])
def test_counts(text, count):
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "B", "-7B", "7GB", "0B", "seven"])
def test_what_is_no_count(text):
    with pytest.raises(UsageError):
        parse_count(text)
