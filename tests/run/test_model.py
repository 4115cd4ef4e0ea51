from __future__ import annotations

import json
import shutil

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxquant.errors import SourceError, UnsupportedError, UsageError
from mlxquant.run.expand import decoded, expand_weights, expanded_bytes
from mlxquant.run.model import load_model

TOKENS = mx.array([[5, 17, 300, 42]])


def logits(loaded):
    return np.array(loaded.model(TOKENS).astype(mx.float32))


def copy(folder, to, **changes):
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(config | changes))
    return to


def test_float_folder_expands_to_float32(folders):
    loaded = load_model(folders["llama"])
    assert (loaded.kind, loaded.quantization, loaded.expanded) == ("hf", "not quantized", True)
    assert {a.dtype for _, a in tree_flatten(loaded.model.parameters())} == {mx.float32}
    assert loaded.weight_bytes == sum(a.nbytes for _, a in tree_flatten(loaded.model.parameters()))
    plain = load_model(folders["llama"], expand="off")
    assert plain.weight_bytes * 2 == loaded.weight_bytes
    assert np.abs(logits(loaded) - logits(plain)).max() < 0.1


def test_rope_settings_of_newer_transformers_are_run(folders, tmp_path):
    """transformers 5 writes rope_parameters, which stock mlx-lm does not read for llama."""
    flat = copy(folders["llama"], tmp_path / "flat", rope_theta=500.0)
    nested = copy(folders["llama"], tmp_path / "nested", rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    config = json.loads((nested / "config.json").read_text())
    del config["rope_theta"]
    (nested / "config.json").write_text(json.dumps(config))
    assert np.array_equal(logits(load_model(nested)), logits(load_model(flat)))
    assert not np.array_equal(logits(load_model(nested)), logits(load_model(folders["llama"])))


def test_quantized_folder_expands_to_exactly_what_its_codes_say(quantized):
    loaded = load_model(quantized)
    assert loaded.expanded
    assert loaded.quantization == "4 bit affine, group size 64"
    weights = mx.load(str(quantized / "model.safetensors"))
    name = "model.layers.0.mlp.down_proj"
    codes = np.array(weights[f"{name}.weight"])
    nibbles = (codes[..., None] >> np.arange(0, 32, 4, dtype=np.uint32)) & 15
    groups = nibbles.reshape(codes.shape[0], -1, 64).astype(np.float32)
    scale, bias = (np.array(weights[f"{name}.{part}"].astype(mx.float32))[..., None] for part in ("scales", "biases"))
    wanted = (groups * scale + bias).reshape(codes.shape[0], -1)
    found = np.array(loaded.model.model.layers[0].mlp.down_proj.weight)
    # One rounding of the product may be fused away.
    np.testing.assert_allclose(found, wanted, rtol=0, atol=float(np.abs(wanted).max()) * 2**-23)


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "nvfp4", "mxfp8"])
def test_expanded_model_agrees_with_the_quantized_one(folders, tmp_path, mode):
    from mlx_lm.convert import convert

    convert(str(folders["qwen3"]), str(tmp_path / "q"), quantize=True, q_mode=mode, dtype="float32")
    exact, quantized = load_model(tmp_path / "q"), load_model(tmp_path / "q", expand="off")
    assert exact.expanded
    assert not quantized.expanded
    np.testing.assert_allclose(logits(exact), logits(quantized), atol=2e-4)


def test_auto_stays_quantized_where_float32_does_not_fit(quantized):
    loaded = load_model(quantized, memory_bytes=10_000)
    assert not loaded.expanded
    assert "slow on a CPU" in loaded.notes[0]
    assert load_model(quantized, memory_bytes=10_000, expand="on").expanded


def test_expanded_bytes_are_foretold(quantized):
    assert expanded_bytes(load_model(quantized, expand="off").model) == load_model(quantized).weight_bytes


def test_experts_and_heads_expand_too():
    from mlx_lm.models.mla import MultiLinear
    from mlx_lm.models.switch_layers import SwitchLinear

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = SwitchLinear(64, 32, 3, bias=True)
            self.heads = MultiLinear(64, 32, 2)
            self.embed = nn.Embedding(16, 64)

    model = Model()
    model.experts.bias = mx.ones((3, 32))
    nn.quantize(model, group_size=64, bits=8)
    model.same = model.embed
    wanted = {name: decoded(layer) for name, layer in model.leaf_modules().items()}
    assert expand_weights(model) == []
    assert isinstance(model.experts, SwitchLinear)
    assert isinstance(model.heads, MultiLinear)
    assert model.embed is model.same
    for name, weight in wanted.items():
        assert mx.array_equal(model[name].weight, weight)
    x, chosen = mx.ones((1, 1, 1, 64)), mx.array([[2]], dtype=mx.uint32)
    assert mx.allclose(model.experts(x, chosen)[0, 0, 0], wanted["experts"][2].sum(-1) + 1, atol=1e-4)


def test_nvfp4_experts_with_a_scale_each_expand():
    from mlx_lm.models.switch_layers import SwitchLinear

    layer = SwitchLinear(64, 32, 3, bias=False)
    layer.weight = mx.random.normal((3, 32, 64), key=mx.random.key(0)) * mx.array([1.0, 10.0, 0.1])[:, None, None]
    found = decoded(layer.to_quantized(16, 4, mode="nvfp4", global_scale=True))
    for expert in range(3):
        error = mx.abs(found[expert] - layer.weight[expert]).max() / mx.abs(layer.weight[expert]).max()
        assert error < 0.15


def test_unknown_quantized_layers_are_left_and_named():
    class Odd(nn.QuantizedLinear):
        pass

    model = nn.Sequential(Odd(64, 64), nn.Linear(64, 64))
    assert expand_weights(model) == ["layers.0"]
    assert isinstance(model.layers[0], Odd)


def test_lazy_model_reads_weights_when_told(folders):
    before = mx.get_active_memory()
    loaded = load_model(folders["llama"], lazy=True)
    assert loaded.weight_bytes > 1_000_000
    assert mx.get_active_memory() - before < 10_000
    loaded.materialize()
    assert mx.get_active_memory() - before >= loaded.weight_bytes


def test_code_of_its_own_is_refused_by_name(folders, tmp_path):
    folder = copy(folders["llama"], tmp_path / "m", model_file="model_of_mine.py")
    (folder / "model_of_mine.py").write_text("raise SystemExit('ran')")
    with pytest.raises(UnsupportedError, match=r"model_of_mine\.py"):
        load_model(folder)


@pytest.mark.parametrize("method", ["gptq", "compressed-tensors", "bitsandbytes"])
def test_schemes_that_would_be_misread_are_refused(folders, tmp_path, method):
    folder = copy(folders["llama"], tmp_path / "m", quantization_config={"quant_method": method})
    with pytest.raises(UnsupportedError, match=method):
        load_model(folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "llama9"}, "no model family 'llama9'"),
        ({"hidden_size": 96}, "do not make a model"),
        ({"num_hidden_layers": 5}, "do not make a model"),
        ({"num_hidden_layers": "many"}, "do not make a model"),
        ({"model_type": None}, "no model_type"),
    ],
)
def test_configs_of_lies_end_in_one_line(folders, tmp_path, changes, said):
    folder = copy(folders["llama"], tmp_path / "m", **changes)
    with pytest.raises(SourceError, match=said) as caught:
        load_model(folder)
    assert "\n" not in caught.value.message


def test_truncated_weights(folders, tmp_path):
    folder = copy(folders["llama"], tmp_path / "m")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(SourceError):
        load_model(folder)


def test_expand_has_three_values(folders):
    with pytest.raises(UsageError):
        load_model(folders["llama"], expand="maybe")


def test_missing_folder(tmp_path):
    with pytest.raises(SourceError):
        load_model(tmp_path / "nothing")


def test_a_folder_whose_name_looks_like_a_pattern(folders, tmp_path):
    shutil.copytree(folders["llama"], tmp_path / "[exl2] smol*")
    tokens = mx.array([[1, 2, 3]])
    found, expected = (load_model(path).model(tokens) for path in (tmp_path / "[exl2] smol*", folders["llama"]))
    assert mx.array_equal(found, expected)
