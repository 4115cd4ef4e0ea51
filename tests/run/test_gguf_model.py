"""A .gguf file runs as the folder it was made from."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlxquant.errors import SourceError
from mlxquant.run.cache import plan_cache
from mlxquant.run.generate import generate
from mlxquant.run.model import load_model
from mlxquant.run.text import Text
from tests.gguf_files import write_gguf
from tests.tiny import make


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def pair(request, tmp_path_factory):
    """A float16 folder and the same model as a GGUF file of F16 tensors."""
    root = tmp_path_factory.mktemp("gguf")
    folder = make(root / request.param, request.param, dtype="float16")
    return folder, write_gguf(folder, root / "model.gguf", "F16")


def greedy(path):
    model = load_model(path).model
    return [t.id for t in generate(model, [5, 17, 300, 42], plan_cache(model).make(), max_tokens=32)]


def test_same_weights_same_tokens(pair):
    folder, file = pair
    assert load_model(file, lazy=True).kind == "gguf"
    tokens = mx.array([[5, 17, 300, 42]])
    logits = [np.array(load_model(path).model(tokens)) for path in pair]
    np.testing.assert_array_equal(*logits)
    assert greedy(file) == greedy(folder)


def test_same_text(pair):
    folder, file = (Text.load(path) for path in pair)
    page = "Grüße, мир! 你好 👩‍👩‍👧\n\n\ttabs  and spaces 1234"
    assert file.encode(page) == folder.encode(page)
    assert file.eos_ids == folder.eos_ids
    messages = [{"role": "user", "content": "Hello"}]
    assert file.render(messages) == folder.render(messages)


def test_lazy_file_has_shapes_and_no_weights(pair):
    before = mx.get_active_memory()
    loaded = load_model(pair[1], lazy=True)
    assert loaded.expanded
    assert loaded.weight_bytes == load_model(pair[0], lazy=True).weight_bytes
    assert plan_cache(loaded.model).bytes_per_token == plan_cache(load_model(pair[0], lazy=True).model).bytes_per_token
    assert mx.get_active_memory() - before < 10_000


def test_without_expansion_weights_keep_their_dtype(pair):
    loaded = load_model(pair[1], expand="off")
    assert loaded.model.model.layers[0].mlp.up_proj.weight.dtype == mx.float16


def test_truncated_file(pair, tmp_path):
    content = pair[1].read_bytes()
    (tmp_path / "short.gguf").write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(SourceError, match=r"short\.gguf"):
        load_model(tmp_path / "short.gguf")


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """The same model as a GGUF file of Q4_0 tensors, whose codes MLX can hold as they are."""
    root = tmp_path_factory.mktemp("quantized")
    return write_gguf(make(root / "llama", "llama"), root / "model.gguf", "Q4_0")


def test_blocks_are_taken_over_where_nothing_is_expanded(quantized):
    """As on a Mac's GPU: packed weights, and the logits of the exactly decoded ones."""
    packed, decoded = load_model(quantized, expand="off"), load_model(quantized)
    layer = packed.model.model.layers[0].mlp.up_proj
    assert (layer.bits, layer.group_size, layer.scales.dtype) == (4, 32, mx.float16)
    assert packed.weight_bytes < decoded.weight_bytes / 4
    tokens = mx.array([[5, 17, 300, 42]])
    exact, ours = (np.array(m.model(tokens).astype(mx.float32)) for m in (decoded, packed))
    assert np.abs(exact - ours).max() < 0.02 * np.abs(exact).max()  # float16 activations


def test_taken_over_weights_are_the_decoded_ones(quantized):
    from mlxquant.run.expand import expand_weights

    packed, decoded = load_model(quantized, expand="off"), load_model(quantized)
    expand_weights(packed.model)
    tokens = mx.array([[5, 17, 300, 42]])
    exact, ours = (np.array(m.model(tokens)) for m in (decoded, packed))
    np.testing.assert_allclose(ours, exact, rtol=0, atol=2e-3 * np.abs(exact).max())  # norms rounded to float16


def test_lazy_taking_over_reads_no_weight(quantized):
    before = mx.get_active_memory()
    loaded = load_model(quantized, expand="off", lazy=True)
    assert loaded.quantization == "Q4_0"
    assert mx.get_active_memory() - before < 10_000
