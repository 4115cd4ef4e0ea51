from __future__ import annotations

import subprocess
import sys

import numpy as np

from mlxquant.codecs import kernels


def test_a_kernel_that_cannot_be_cached_is_still_compiled() -> None:
    """numba refuses to cache a function that stands in no file with the same error as for unwritable folders."""
    scope: dict[str, object] = {}
    exec("def add_one(x):\n    return x + 1\n", scope)
    assert kernels.jit(scope["add_one"])(1) == 2  # type: ignore[arg-type]


def test_pack_and_unpack_are_inverse() -> None:
    for bits in (2, 3, 4, 5, 6, 8):
        codes = np.random.default_rng(bits).integers(0, 2**bits, 4096, dtype=np.uint8)
        packed, back = np.empty(4096 * bits // 8, np.uint8), np.empty_like(codes)
        kernels.pack(codes.copy(), bits, packed)
        kernels.unpack(packed, bits, back)
        np.testing.assert_array_equal(back, codes)


def test_planning_modules_do_not_load_numba() -> None:
    code = (
        "import sys, mlxquant.codecs.spec, mlxquant.codecs.floats, mlxquant.codecs.ggml;"
        "assert not {'numba', 'mlx'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
