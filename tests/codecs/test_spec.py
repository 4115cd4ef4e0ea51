from __future__ import annotations

import pytest

from mlxquant.codecs.spec import AFFINE_BITS, AFFINE_GROUP_SIZES, KEEP, MX_MODES, affine, parse_codec
from mlxquant.errors import UsageError


def test_labels_are_what_set_takes() -> None:
    codecs = [affine(bits, size) for bits in AFFINE_BITS for size in AFFINE_GROUP_SIZES]
    for codec in [*codecs, *map(parse_codec, MX_MODES), KEEP]:
        assert parse_codec(codec.label) == codec


@pytest.mark.parametrize("text", ["7g64", "4g16", "4g", "g64", "4G64", "fp4", "", "44g64", "4g64 "])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_codec(text)
    assert caught.value.hint


def test_parts_of_stacked_experts() -> None:
    codes, scales, biases = affine(3, 64).parts("mlp.weight", (8, 16, 128), "BF16")
    assert (codes.name, codes.shape, codes.dtype) == ("mlp.weight", (8, 16, 12), "U32")
    assert (scales.name, scales.shape, scales.dtype) == ("mlp.scales", (8, 16, 2), "BF16")
    assert (biases.name, biases.shape) == ("mlp.biases", (8, 16, 2))
    assert [part.dtype for part in parse_codec("nvfp4").parts("mlp.weight", (16, 128), "BF16")] == ["U32", "U8"]
