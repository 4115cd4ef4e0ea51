"""Room for weights: what `fit` itself calls a fit at ease, and one byte more that it does not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mlxquant.errors import MemoryBudgetError
from mlxquant.fit.cache import cache_of
from mlxquant.fit.memory import need, verdict
from mlxquant.fit.values import Asked
from mlxquant.fit.weights import budget_bytes
from mlxquant.machine import described
from tests.fit.test_memory import GEMMA, LLAMA, level


@pytest.mark.parametrize("shape", [LLAMA, GEMMA])
@pytest.mark.parametrize("kv_bits", [None, 8])
@pytest.mark.parametrize(("mac", "context_tokens"), [("M2 16GB", 8192), ("M2 16GB", 20_000), ("64GB", 131_072)])
def test_the_last_byte_that_fits_at_ease(shape, mac, context_tokens, kv_bits):
    machine, asked = described(mac), Asked(context_tokens, kv_bits, 2048)
    room = budget_bytes(shape, machine, asked)

    def said(weight_bytes):
        cache = cache_of(shape, kv_bits=kv_bits)
        return verdict(need(level(weight_bytes), cache, shape, machine, context_tokens, 2048), machine)

    assert (said(room), said(room + 1)) == ("fits", "tight")


def test_a_longer_context_leaves_less():
    rooms = [budget_bytes(LLAMA, described("M2 16GB"), Asked(tokens, None, 2048)) for tokens in (1024, 8192, 32_768)]
    assert rooms == sorted(rooms, reverse=True)
    assert len(set(rooms)) == 3


def test_no_room_at_all_is_said_with_the_next_step():
    with pytest.raises(MemoryBudgetError, match="without any weights") as error:
        budget_bytes(LLAMA, described("M2 8GB"), Asked(131_072, None, 2048))
    assert "--context" in error.value.hint


def test_a_buffer_that_no_allocation_may_have_is_no_room():
    machine = replace(described("M2 16GB"), max_buffer_bytes=1_000_000)
    with pytest.raises(MemoryBudgetError, match="one buffer of"):
        budget_bytes(LLAMA, machine, Asked(8192, 8, 2048))
