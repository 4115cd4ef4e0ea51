"""`--recipe uniform` and the mixed recipes write what the real `mlx_lm.convert` writes, bit for bit.

On the CPU device (tests/conftest.py): MLX's Metal kernel rounds halves away from zero and its CPU kernel to even; ours
are the CPU's bytes.
"""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import convert as mlx_lm_convert

from mlxquant.convert.sources import open_source
from mlxquant.convert.to_mlx import to_mlx
from mlxquant.plan.plan import make_plan
from mlxquant.plan.recipe import settings
from tests.tiny import FAMILIES, make

DTYPES = ("bfloat16", "float16", "float32")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Source folders by (family, dtype, tied), made once."""
    made: dict[tuple, Path] = {}

    def get(family="llama", dtype="bfloat16", tied=False, **more):
        key = (family, dtype, tied, *sorted(more.items()))
        if key not in made:
            made[key] = make(tmp_path_factory.mktemp(family), family, dtype=dtype, tied=tied, **more)
        return made[key]

    return get


def ours(source: Path, out: Path, **wanted) -> Path:
    opened = open_source(source)
    return to_mlx(opened, make_plan(opened.config, opened.specs, settings(**wanted)), out)


def theirs(source: Path, out: Path, **wanted) -> Path:
    mlx_lm_convert(str(source), str(out), quantize=True, **wanted)
    return out


def tensors(folder: Path) -> dict[str, tuple]:
    loaded = {}
    for path in sorted(folder.glob("model*.safetensors")):
        for name, array in mx.load(str(path)).items():
            loaded[name] = (array.dtype, array.shape, np.array(array.view(mx.uint8)).tobytes())
    return loaded


def assert_same(mine: Path, other: Path) -> None:
    a, b = tensors(mine), tensors(other)
    assert sorted(a) == sorted(b)
    assert [n for n in a if a[n] != b[n]] == []


def quantization(folder: Path) -> dict:
    """What a loader takes from config.json for each quantized module: its own entry, else the root's."""
    block = json.loads((folder / "config.json").read_text())["quantization"]
    root = {key: block[key] for key in ("bits", "group_size", "mode")}
    modules = [name.removesuffix(".scales") for name in tensors(folder) if name.endswith(".scales")]
    assert modules
    return {m: root | block[m] if isinstance(block.get(m), dict) else root for m in modules}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_affine(sources, tmp_path, bits, group_size, dtype):
    source = sources(dtype=dtype, tied=bits % 2 == 0)
    mine = ours(source, tmp_path / "a", bits=bits, group_size=group_size, recipe="uniform")
    other = theirs(source, tmp_path / "b", q_bits=bits, q_group_size=group_size)
    assert_same(mine, other)
    assert quantization(mine) == quantization(other)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["mxfp4", "nvfp4", "mxfp8"])
def test_mx_modes(sources, tmp_path, mode, dtype, tied):
    source = sources(dtype=dtype, tied=tied)
    mine = ours(source, tmp_path / "a", mode=mode, recipe="uniform")
    other = theirs(source, tmp_path / "b", q_mode=mode)
    assert_same(mine, other)
    assert quantization(mine) == quantization(other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("recipe", ["mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6"])
def test_mixed_recipes(sources, tmp_path, recipe, tied, dtype):
    source = sources(dtype=dtype, tied=tied, layers=9)  # 9: not a multiple of 8, so the layer rule's edges show
    mine = ours(source, tmp_path / "a", recipe=recipe, group_size=32)
    other = theirs(source, tmp_path / "b", quant_predicate=recipe, q_group_size=32)
    assert_same(mine, other)
    assert quantization(mine) == quantization(other)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cast_to_another_dtype(sources, tmp_path, dtype, tied):
    source = sources(dtype="float32", tied=tied)
    mine = ours(source, tmp_path / "a", dtype=dtype, recipe="uniform")
    other = theirs(source, tmp_path / "b", dtype=dtype)
    assert_same(mine, other)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family(sources, tmp_path, family):
    """Expert stacks, fused projections, shifted norms and each family's own 8-bit routers."""
    source = sources(family=family)
    mine = ours(source, tmp_path / "a", recipe="uniform", group_size=32)
    other = theirs(source, tmp_path / "b", q_group_size=32)
    assert_same(mine, other)
    assert quantization(mine) == quantization(other)


def test_the_comparison_can_fail(sources, tmp_path):
    mine = ours(sources(), tmp_path / "a", bits=4, recipe="uniform")
    other = theirs(sources(), tmp_path / "b", q_bits=5)
    with pytest.raises(AssertionError):
        assert_same(mine, other)
