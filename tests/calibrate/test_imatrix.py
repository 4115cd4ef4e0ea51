"""Importance: against a model that is listened to whole, and against what llama-imatrix finds on the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.switch_layers import SwitchLinear

from mlxquant.calibrate.imatrix import Stopped, column_weights, float_plan, gguf_sums, importance
from mlxquant.calibrate.layered import Layered
from mlxquant.calibrate.text import made
from mlxquant.calibrate.values import Samples
from mlxquant.convert.sources import OpenSource, open_source
from mlxquant.errors import SourceError, UnsupportedError
from mlxquant.files.imatrix import Imatrix, read_imatrix, write_imatrix
from mlxquant.measure.corpus import load_corpus
from mlxquant.measure.runner import Silent
from mlxquant.measure.windows import Protocol, cut
from mlxquant.run.model import load_model
from mlxquant.run.text import Text
from tests import oracle
from tests.run import gguf_models
from tests.tiny import make

# One of each kind of layer: fused and biased projections, tied heads, experts beside a shared one, delta nets, sinks.
FAMILIES = ["llama", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next", "gemma", "gemma2",
            "gemma3", "gemma3_text", "phi3", "smollm3", "olmo2", "granite", "gpt_oss"]  # fmt: skip


def opened(folder: Path) -> tuple[OpenSource, Layered]:
    source = open_source(folder)
    return source, Layered(source, float_plan(source.config, source.specs))


def some_samples(count: int = 3, length: int = 40, seed: int = 0) -> Samples:
    return made(np.random.default_rng(seed).integers(3, 512, (count, length)), "random tokens")


class Listener(nn.Module):
    """In a linear layer's place in mlx-lm's own model, in float64."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner, self.seen = inner, []

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        chosen = args[0] if args else mx.zeros(x.shape[:-1], dtype=mx.int32)
        spread = mx.broadcast_to(x, (*chosen.shape, *x.shape[-2:])) if args else x
        self.seen.append((np.array(spread.reshape(-1, x.shape[-1])).astype(np.float64), np.array(chosen.reshape(-1))))
        return self.inner(x, *args, **kwargs)

    def squares(self, experts: int) -> tuple[np.ndarray, np.ndarray]:
        x, expert = (np.concatenate(parts) for parts in zip(*self.seen, strict=True))
        sums = np.stack([(x[expert == e] ** 2).sum(0) for e in range(max(1, experts))])
        return sums, np.bincount(expert, minlength=max(1, experts))


def listened(folder: Path, samples: Samples) -> dict[str, Listener]:
    """The model run whole, by mlx-lm's class, in float32."""
    model = load_model(folder, expand="on").model
    ears = {p: Listener(m) for p, m in model.named_modules() if type(m) in (nn.Linear, SwitchLinear)}
    model.update_modules(_tree(ears))
    model(mx.array(samples.tokens_BL))
    return ears


def _tree(modules: dict[str, Any]) -> Any:
    from mlx.utils import tree_unflatten

    return tree_unflatten(list(modules.items()))


@pytest.mark.parametrize("name", ["trained_dense", "trained_experts"])
def test_sums_are_those_of_the_whole_model(name: str, request: pytest.FixtureRequest) -> None:
    folder, samples = request.getfixturevalue(name), some_samples()
    found = importance(opened(folder)[1], samples, head=True)
    ears = listened(folder, samples)
    assert {f"{path}.weight" for path in ears} == found.keys()
    for path, ear in ears.items():
        moments = found[f"{path}.weight"]
        expected, counts = ear.squares(moments.experts)
        sums, tokens = moments.sums(expected.shape[1])
        assert tokens.tolist() == counts.tolist(), path
        np.testing.assert_allclose(sums, expected, rtol=1e-3, atol=1e-6 * expected.max(), err_msg=path)


def test_a_tied_head_stands_under_the_embeddings_name(tmp_path: Path) -> None:
    source, model = opened(make(tmp_path / "m", "llama", tied=True))
    found = importance(model, some_samples(), head=True)
    assert found["model.embed_tokens.weight"].tokens == 120
    names = gguf_sums(source.config, source.specs, found)
    assert {name for name in names if not name.startswith("blk.")} == set()
    assert "model.embed_tokens.weight" not in importance(model, some_samples())


def test_weights_of_columns(trained_experts: Path) -> None:
    model = opened(trained_experts)[1]
    few = importance(model, some_samples(1, 8), least_tokens=3)
    weights = column_weights(few)
    for name, moments in few.items():
        shape = model.tensors[name].target.shape
        assert weights[name].shape == (*shape[:-2], shape[-1]), name
        assert weights[name].dtype == np.float32
        for expert in moments.fallbacks:
            np.testing.assert_array_equal(weights[name][expert], moments.mean().astype(np.float32))
    assert any(moments.fallbacks for moments in few.values()), "what this is about"


def test_activations_that_are_no_numbers_name_their_layer(tmp_path: Path) -> None:
    def broken(rng: Any, width: int, layers: int, tied: bool) -> Any:
        from tests.tiny import FAMILIES as BUILD

        config, tensors = BUILD["llama"](rng, width, layers, tied)
        for name in ("up_proj", "gate_proj"):
            tensors[f"model.layers.1.mlp.{name}.weight"] *= 1e30
        return config, tensors

    model = opened(make(tmp_path / "m", "llama", build=broken))[1]
    with pytest.raises(SourceError, match=r"model\.layers\.1\.mlp\.down_proj\.weight: what enters .* NaN"):
        importance(model, some_samples())


def test_it_stops_between_batches_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Pressed(Silent):
        def stopped(self) -> bool:
            return True

    model = opened(make(tmp_path / "m", "llama"))[1]
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "scratch").mkdir()
    with pytest.raises(Stopped):
        importance(model, some_samples(), Pressed())
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_family_without_a_place_in_gguf(tmp_path: Path) -> None:
    source, _ = opened(make(tmp_path / "m", "starcoder2"))
    with pytest.raises(UnsupportedError, match="starcoder2"):
        gguf_sums(source.config, source.specs, {})


# -- llama.cpp


def ours_and_theirs(folder: Path, model: Path, text: Path, *, context: int, chunks: int) -> tuple[Imatrix, Imatrix]:
    """What we find, and what llama-imatrix finds, on the same tokens; its cache in float32, as ours is."""
    scratch = model.parent
    flags = ["-c", context, "-b", context, "--chunks", chunks, "-ctk", "f32", "-ctv", "f32", "-fa", "off"]
    oracle.imatrix(model, text, scratch / "theirs.gguf", *map(str, flags), "--process-output")
    windows = cut(Text.load(model), load_corpus(str(text)), Protocol(context, None, chunks))
    source, layered = opened(folder)
    found = importance(layered, made(windows.tokens_WL, "text.txt"), head=True)
    sums = gguf_sums(source.config, source.specs, found)
    write_imatrix(scratch / "ours.gguf", sums, [str(text)], chunks, context)
    return read_imatrix(scratch / "ours.gguf"), read_imatrix(scratch / "theirs.gguf")


def check(ours: Imatrix, theirs: Imatrix, bound: float) -> None:
    """bound: of a weight's difference, over all its columns together, relative."""
    assert (ours.chunks, ours.datasets) == (theirs.chunks, theirs.datasets)
    assert ours.entries.keys() == theirs.entries.keys()
    for name, entry in theirs.entries.items():
        assert ours.entries[name].shape == entry.shape, name
        assert np.abs(ours.entries[name] - entry).sum() < bound * np.abs(entry).sum(), name


@pytest.mark.oracle
@pytest.mark.parametrize("family", FAMILIES)
def test_what_llama_imatrix_finds(family: str, tmp_path: Path) -> None:
    """Columns, experts and names of every kind of layer. Where gelu is looked up in float16, a little apart."""
    folder = gguf_models.make(tmp_path / "m", gguf_models.MODELS[family])
    model, text = gguf_models.write(folder, tmp_path / "m.gguf"), tmp_path / "text.txt"
    letters = [chr(ord(first) + i) for first in "Aa" for i in range(26)]
    text.write_text("".join(np.random.default_rng(0).choice(letters, 1000)))
    ours, theirs = ours_and_theirs(folder, model, text, context=64, chunks=3)
    check(ours, theirs, 1e-3 if "gemma" in family else 1e-5)  # 2.3e-4 and 1e-6 were found
