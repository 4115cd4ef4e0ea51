"""A model cut before its head says what the whole model says, in float32, and is the same model afterwards."""

from __future__ import annotations

import importlib
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxquant.errors import UnsupportedError
from mlxquant.measure import forward
from mlxquant.measure.forward import Split
from mlxquant.run.cache import plan_cache
from mlxquant.run.model import LoadedModel, load_model
from tests.run import gguf_models
from tests.tiny import FAMILIES, VOCAB, make

TOKENS = np.random.default_rng(1).integers(1, VOCAB, 49).astype(np.int32)
FIRST = 20
# Where mlx-lm looks for the first full-attention layer behind the windowed ones.
LAYERS = {"gemma3_text": 7, "gemma3": 7, "cohere2": 5}
WINDOW = {"sliding_window": 16}
# A fast BLAS rounds a chunk's products otherwise than a whole text's, and Gemma 4, whose attention is not scaled, makes
# more of it; without one the states are equal to the bit.
CHUNKED = {"gemma4": 1e-3, "gemma4_text": 1e-3}
INSIDE = ("gemma3n",)  # the head is called within the trunk
SCALED = {
    "llama": {},
    "gemma2": {"final_logit_softcapping": 2.0, "sliding_window": 4096},
    "granite": {"logits_scaling": 3.0},
    "cohere": {"logit_scale": 0.5},
    "phi": {},
}


def split_of(folder: Path, **options) -> tuple[Split, LoadedModel]:
    loaded = load_model(folder, **options)
    return Split(loaded, plan_cache(loaded.model)), loaded


def whole(loaded: LoadedModel, first: int = FIRST) -> np.ndarray:
    return np.array(loaded.model(mx.array([TOKENS[:-1].tolist()]))[0, first:].astype(mx.float32))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in INSIDE])
def test_two_halves_are_the_whole_model(family, tmp_path):
    """Windows shorter than the text, recurrent states, latents, experts, soft caps, scales, tied heads: float32."""
    options = {"layers": LAYERS.get(family, 2), "dtype": "float32", "tied": family in ("llama", "qwen3_next")}
    split, loaded = split_of(make(tmp_path / family, family, **options | SCALED.get(family, {})))
    hidden_PH = split.hidden(TOKENS, FIRST)
    assert hidden_PH.shape == (len(TOKENS) - 1 - FIRST, split.width)
    logits_PV = split.logits(hidden_PH)
    expected_PV = whole(loaded)
    assert logits_PV.dtype == np.float32
    assert logits_PV.shape == (len(hidden_PH), split.vocabulary)
    np.testing.assert_allclose(logits_PV, expected_PV, rtol=0, atol=3e-6 * np.abs(expected_PV).max())
    np.testing.assert_allclose(split.hidden(TOKENS, FIRST, 7), hidden_PH, rtol=0, atol=CHUNKED.get(family, 3e-5))


@pytest.mark.parametrize("name", ["gpt_oss", "gemma3", "qwen3_next", "gemma2", "granite", "smollm3"])
def test_settings_that_count(name, tmp_path):
    """Windows of 16 under a text of 48, caps, epsilons and multipliers that show in the logits; in steps, too."""
    split, loaded = split_of(gguf_models.make(tmp_path / name, gguf_models.MODELS[name]))
    expected_PV = whole(loaded)
    for step in (None, 48, 20, 7):
        logits_PV = split.logits(split.hidden(TOKENS, FIRST, step))
        np.testing.assert_allclose(logits_PV, expected_PV, rtol=0, atol=2e-5 * np.abs(expected_PV).max())


def test_window_reaches_the_states(tmp_path):
    """The test above would pass with windows that nobody sees."""
    folder = gguf_models.make(tmp_path / "short", gguf_models.MODELS["gpt_oss"])
    wide = gguf_models.changed(folder, tmp_path / "wide", sliding_window=64)
    short_PH, wide_PH = (split_of(path)[0].hidden(TOKENS, FIRST) for path in (folder, wide))
    assert np.abs(short_PH - wide_PH).max() > 0.01


def behind(family: str, out_PV: np.ndarray, config: dict) -> np.ndarray:
    """What the published models do with a head's output."""
    if family == "gemma2":
        cap = config["final_logit_softcapping"]
        return np.tanh(out_PV / cap) * cap
    return out_PV / config.get("logits_scaling", 1) * config.get("logit_scale", 1)


def head_of(loaded: LoadedModel) -> nn.Module:
    return loaded.model.lm_head if "lm_head" in loaded.model else loaded.model.model.embed_tokens


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("family", "config"), SCALED.items())
def test_half_precision_heads_compute_in_float32(family, config, dtype, tmp_path):
    split, loaded = split_of(make(tmp_path / family, family, dtype=dtype, **config), expand="off")
    assert split.dtype == dtype
    hidden_PH = split.hidden(TOKENS, FIRST)
    again_PH = np.array(mx.array(hidden_PH).astype(getattr(mx, dtype)).astype(mx.float32))
    assert np.array_equal(hidden_PH, again_PH), "nothing is rounded on the way"
    head = {name: np.array(a.astype(mx.float32)).astype(np.float64) for name, a in head_of(loaded).items()}
    expected_PV = behind(family, hidden_PH @ head["weight"].T + head.get("bias", 0), loaded.config)
    np.testing.assert_allclose(split.logits(hidden_PH), expected_PV, rtol=0, atol=1e-6 * np.abs(expected_PV).max())
    assert np.abs(whole(loaded) - expected_PV).max() > 1e-4, "the model's own head is in half precision"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("bits", "mode"), [(4, "affine"), (6, "affine"), (4, "mxfp4")])
def test_quantized_heads_compute_in_float32(bits, mode, tied, tmp_path):
    split, loaded = split_of(make(tmp_path / "llama", "llama", tied=tied), expand="off")
    nn.quantize(loaded.model, 32, bits, mode=mode)
    hidden_PH = split.hidden(TOKENS, FIRST)
    head = head_of(loaded)
    scales, biases = head["scales"], head.get("biases")
    if mode == "affine":  # mx.dequantize computes in their dtype, whatever it is asked for
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    weight_VH = mx.dequantize(head["weight"], scales, biases, group_size=32, bits=bits, mode=mode, dtype=mx.float32)
    expected_PV = hidden_PH @ np.array(weight_VH, np.float64).T
    np.testing.assert_allclose(split.logits(hidden_PH), expected_PV, rtol=0, atol=2e-6 * np.abs(expected_PV).max())


@pytest.mark.parametrize("family", ["llama", "phi", "cohere", "gemma2"])
def test_slices_of_the_vocabulary_change_nothing(family, tmp_path, monkeypatch):
    split, _ = split_of(make(tmp_path / family, family, **SCALED[family]), expand="off")
    hidden_PH = split.hidden(TOKENS, FIRST)
    at_once_PV = split.logits(hidden_PH)
    for rows in (1 / 128, 100, VOCAB - 1):  # a slice is one row at least
        monkeypatch.setattr(forward, "_SLICE", int(rows * split.width))
        np.testing.assert_allclose(split.logits(hidden_PH), at_once_PV, rtol=0, atol=1e-5)


def state(model: nn.Module) -> list[tuple[str, int]]:
    """Every module and array, in the model's order."""
    return [(name, id(module)) for name, module in model.named_modules()] + [
        (name, id(array)) for name, array in tree_flatten(model.parameters())
    ]


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("llama", True), ("mamba2", True), ("cohere", True)])
def test_a_model_is_left_as_it_was(family, tied, tmp_path):
    split, loaded = split_of(make(tmp_path / family, family, tied=tied), expand="off")
    before = state(loaded.model)
    hidden_PH = split.hidden(TOKENS, FIRST)
    split.logits(hidden_PH)
    assert state(loaded.model) == before
    with pytest.raises(ValueError, match="matmul"):
        split.logits(hidden_PH[:, :-1])
    assert state(loaded.model) == before


@pytest.mark.parametrize("tied", [True, False])
def test_logits_without_the_trunk(tied, tmp_path):
    split, loaded = split_of(make(tmp_path / "llama", "llama", tied=tied))
    hidden_PH = split.hidden(TOKENS, FIRST)
    before_PV = split.logits(hidden_PH)
    split.drop_trunk()
    assert np.array_equal(split.logits(hidden_PH), before_PV)
    assert [name for name, _ in tree_flatten(loaded.model.parameters())] == [
        "model.embed_tokens.weight" if tied else "lm_head.weight"
    ]


@pytest.mark.parametrize("tied", [True, False])
def test_peak_memory_of_logits_stays_near_a_slice(tied, tmp_path, monkeypatch):
    """A bfloat16 head of 1 MiB in float32 would be 2 MiB more; here a slice is 256 KiB."""
    split, _ = split_of(make(tmp_path / "llama", "llama", width=1024, layers=1, tied=tied), expand="off")
    hidden_PH = split.hidden(TOKENS[:9], 4)
    monkeypatch.setattr(forward, "_SLICE", 1 << 16)
    split.logits(hidden_PH)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    logits_PV = split.logits(hidden_PH)
    assert mx.get_peak_memory() - before < 4 * (1 << 16) * 2 + 4 * logits_PV.nbytes + hidden_PH.nbytes * 4


def random_model(family: str, **config) -> LoadedModel:
    module = importlib.import_module(f"mlx_lm.models.{family}")
    model = module.Model(module.ModelArgs.from_dict({"model_type": family} | config))
    return LoadedModel(model, {"model_type": family}, Path("somewhere"), "hf", "not quantized", 0)


def refused(loaded: LoadedModel) -> None:
    with pytest.raises(UnsupportedError, match=rf"somewhere: .*{loaded.config['model_type']}"):
        Split(loaded, plan_cache(loaded.model))


NEOX = {
    "hidden_size": 64, "intermediate_size": 64, "vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 64, "layer_norm_eps": 1e-5, "rotary_emb_base": 10000, "rotary_pct": 0.5,
}  # fmt: skip


def test_a_head_inside_the_trunk_is_refused():
    """As wide as the vocabulary, so that no shape gives it away."""
    refused(random_model("gpt_neox", **NEOX))


@pytest.mark.parametrize("family", INSIDE)
def test_families_of_ours_with_a_head_inside_the_trunk_are_refused(family, tmp_path):
    with pytest.raises(UnsupportedError, match=f"where the output head of '{family}' begins"):
        split_of(make(tmp_path / family, family))


def test_trunks_that_are_not_called_or_give_no_states_are_refused(tmp_path):
    class Pair(nn.Module):
        def __init__(self, trunk):
            super().__init__()
            self.trunk = trunk

        def __call__(self, *arguments, **options):
            return self.trunk(*arguments, **options), None

    class First(nn.Module):
        """A model whose trunk gives a pair, and which also knows another way around it."""

        def __init__(self, model, around):
            super().__init__()
            self.model, self.around = Pair(model), around

        def __call__(self, tokens, cache=None):
            return self.model.trunk(tokens, cache=cache) if self.around else self.model(tokens, cache=cache)[0]

        @property
        def layers(self):
            return self.model.trunk.layers

    loaded = load_model(make(tmp_path / "llama", "llama"))
    loaded.path = Path("somewhere")
    trunk = loaded.model.model
    for around in (True, False):
        loaded.model = First(trunk, around)
        refused(loaded)


def test_other_arguments_are_the_models_own_business():
    """phixtral's trunk wants a mask before its cache."""
    config = {
        "num_vocab": 64, "model_dim": 64, "num_heads": 2, "num_layers": 2, "rotary_dim": 16, "num_experts_per_tok": 1,
        "num_local_experts": 2,
    }  # fmt: skip
    loaded = random_model("phixtral", **config)
    split = Split(loaded, plan_cache(loaded.model))
    tokens = TOKENS % 64
    expected_PV = np.array(loaded.model(mx.array([tokens[:-1].tolist()]))[0, FIRST:])
    logits_PV = split.logits(split.hidden(tokens, FIRST))
    np.testing.assert_allclose(logits_PV, expected_PV, rtol=0, atol=1e-5 * np.abs(expected_PV).max())


def test_what_is_unread_can_be_cut_and_read_later(tmp_path):
    folder = make(tmp_path / "llama", "llama", tied=True)
    read, _ = split_of(folder)
    unread, loaded = split_of(folder, lazy=True)
    assert (unread.width, unread.vocabulary, unread.dtype) == (read.width, read.vocabulary, read.dtype)
    loaded.materialize()
    assert np.array_equal(unread.logits(unread.hidden(TOKENS, FIRST)), read.logits(read.hidden(TOKENS, FIRST)))
