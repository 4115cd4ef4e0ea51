from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Tiny float folders by family."""
    from tests.tiny import make

    root = tmp_path_factory.mktemp("models")
    return {family: make(root / family, family, tied=family == "qwen2") for family in ("llama", "qwen2", "qwen3")}


@pytest.fixture(scope="session")
def quantized(folders, tmp_path_factory):
    """The llama folder quantized by stock mlx-lm: 4 bit, group size 64, bfloat16."""
    from mlx_lm.convert import convert

    out = tmp_path_factory.mktemp("quantized") / "llama-4bit"
    convert(str(folders["llama"]), str(out), quantize=True)
    return out


@pytest.fixture(scope="session")
def text(folders):
    from mlxquant.run.text import Text

    return Text.load(folders["llama"])
