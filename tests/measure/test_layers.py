"""One weight of the student at a time: what is listed, what it costs, and that the teacher stays the teacher."""

from __future__ import annotations

from functools import reduce

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.convert import convert

from mlxquant.errors import PlanError
from mlxquant.measure import layers
from mlxquant.measure.changes import changes
from mlxquant.measure.corpus import Corpus
from mlxquant.measure.forward import Split
from mlxquant.measure.layers import inject, whole
from mlxquant.measure.windows import Protocol, Windows
from mlxquant.run.cache import plan_cache
from mlxquant.run.model import LoadedModel, load_model
from tests.gguf_files import write_gguf
from tests.measure.test_forward import LAYERS, state
from tests.tiny import VOCAB, make

CONTEXT = 24
RNG = np.random.default_rng(1)
WINDOWS = Windows(
    RNG.integers(1, VOCAB, (2, CONTEXT)).astype(np.int32),
    CONTEXT // 2, 2, None, Corpus("", "random", ""), Protocol(CONTEXT),
)  # fmt: skip
# Those whose loops over layers differ: windows, states, a list of kinds, embeddings that are scaled.
TRUNKS = (
    "llama", "smollm3", "granite", "gemma2", "gemma3", "cohere2", "phi3", "gpt_oss", "deepseek_v3", "qwen3_next",
    "mamba2", "nemotron_h",
)  # fmt: skip


def weights(model: nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


def disturb(loaded: LoadedModel, name: str) -> None:
    array = weights(loaded.model)[name]
    noise = np.random.default_rng(2).normal(size=array.shape).astype(np.float32)
    loaded.model.load_weights([(name, (array + 0.05 * mx.array(noise)).astype(array.dtype))], strict=False)


def log_probabilities(model: nn.Module, tokens_L: np.ndarray) -> np.ndarray:
    logits_LV = np.array(model(mx.array([tokens_L[:-1].tolist()]))[0].astype(mx.float32)).astype(np.float64)
    logits_LV = logits_LV[WINDOWS.first :]
    return logits_LV - np.log(np.exp(logits_LV).sum(-1, keepdims=True))


def mean_kl(p: nn.Module, q: nn.Module) -> float:
    """Over the same positions, with nothing of ours."""
    found = []
    for tokens_L in WINDOWS.tokens_WL:
        p_PV, q_PV = log_probabilities(p, tokens_L), log_probabilities(q, tokens_L)
        found.append((np.exp(p_PV) * (p_PV - q_PV)).sum(-1))
    return float(np.mean(found))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make(tmp_path_factory.mktemp("llama") / "llama", "llama", layers=3)


@pytest.fixture(scope="module")
def four_bit(llama):
    convert(str(llama), str(llama.with_name("four_bit")), quantize=True, q_bits=4)
    return llama.with_name("four_bit")


@pytest.mark.parametrize(
    ("family", "name", "layer", "kind"),
    [
        ("llama", "model.embed_tokens.weight", None, "embedding"),
        ("llama", "model.layers.0.self_attn.v_proj.weight", 0, "attn_v"),
        ("llama", "model.layers.1.mlp.down_proj.weight", 1, "ffn_down"),
        ("llama", "model.layers.1.input_layernorm.weight", 1, "norm"),
        ("llama", "model.norm.weight", None, "norm"),
        ("llama", "lm_head.weight", None, "head"),
        ("qwen2", "model.layers.1.self_attn.k_proj.bias", 1, "bias"),
        ("cohere", "model.embed_tokens.weight", None, "embedding"),  # in both of its places
        ("gpt_oss", "model.layers.1.self_attn.sinks", 1, "other"),
        ("gpt_oss", "model.layers.1.mlp.experts.up_proj.weight", 1, "expert_up"),
        ("deepseek_v3", "model.layers.1.mlp.gate.weight", 1, "router"),
        ("deepseek_v3", "model.layers.0.self_attn.embed_q.weight", 0, "mla_latent"),
        ("qwen3_next", "model.layers.0.linear_attn.A_log", 0, "ssm"),
        ("nemotron_h", "backbone.layers.0.mixer.conv1d.weight", 0, "conv"),
    ],
)
def test_one_difference_is_all_the_divergence(family, name, layer, kind, tmp_path):
    folder = make(tmp_path / family, family)
    teacher, student = load_model(folder), load_model(folder)
    disturb(student, name)
    (found,) = inject(teacher, student, WINDOWS)
    assert (found.name, found.layer, found.kind) == (name, layer, kind)
    assert found.kl.value > 1e-6
    assert abs(found.kl.value - whole(teacher, student, WINDOWS).value) < 1e-12
    assert found.kl.value == pytest.approx(mean_kl(teacher.model, student.model), rel=1e-3)


def test_models_that_are_the_same_have_no_list(llama):
    teacher = load_model(llama)
    assert list(inject(teacher, load_model(llama), WINDOWS)) == []
    assert whole(teacher, load_model(llama), WINDOWS).value == 0.0


@pytest.mark.parametrize("family", TRUNKS)
def test_a_later_beginning_changes_no_figure(family, tmp_path, monkeypatch):
    """Trunks begun at every one of its layers, to the bit. None of these has to be computed whole."""
    folder = make(tmp_path / family, family, layers=LAYERS.get(family, 4))
    teacher, student = load_model(folder), load_model(folder)
    names = [n for n in weights(teacher.model) if n.endswith(("o_proj.weight", "dense.weight", "out_proj.weight"))]
    names += [n for n in weights(teacher.model) if "norm" in n and "layers" not in n and n.endswith("weight")]
    for name in names:
        disturb(student, name)
    compared, same = [], layers._Teacher._same
    monkeypatch.setattr(layers._Teacher, "_same", lambda self: compared.append(same(self)) or compared[-1])
    begun = list(inject(teacher, student, WINDOWS))
    assert sorted(found.name for found in begun) == sorted(name.removeprefix("language_model.") for name in names)
    assert {found.layer for found in begun} >= {None, 1}
    assert compared
    assert all(compared)
    monkeypatch.setattr(layers, "layers_of", lambda trunk: "")
    assert list(inject(teacher, student, WINDOWS)) == begun


def test_layers_before_are_not_computed(llama, monkeypatch):
    """The test above would pass if nothing were ever skipped."""
    teacher, student = load_model(llama), load_model(llama)
    disturb(student, "model.layers.2.self_attn.q_proj.weight")
    rows = []
    block = type(teacher.model.layers[0])
    call = block.__call__
    monkeypatch.setattr(block, "__call__", lambda self, *a, **k: rows.append(self) or call(self, *a, **k))
    found = inject(teacher, student, WINDOWS)
    next(found)
    del rows[:]
    assert next(found, None) is None
    assert rows == []
    disturb(student, "lm_head.weight")
    found = inject(teacher, student, WINDOWS)
    assert next(found).layer == 2
    del rows[:]
    assert next(found).name == "lm_head.weight"
    # What leaves the last layer is computed once for each of two windows, and nothing for the head.
    assert len(rows) == 2


def test_weights_in_any_order(llama):
    """An embedding that is listed behind the layers still changes what enters the first."""
    teacher, student = load_model(llama), load_model(llama)
    for loaded in (teacher, student):
        loaded.model.model["embed_tokens"] = loaded.model.model.pop("embed_tokens")
    for name in ("model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"):
        disturb(student, name)
    found = list(inject(teacher, student, WINDOWS))
    assert [f.layer for f in found] == [1, None]
    alone = load_model(llama)
    disturb(alone, "model.embed_tokens.weight")
    assert found[1].kl == whole(teacher, alone, WINDOWS)


class Residual(nn.Module):
    """A trunk whose last word hears from the first layer, too."""

    def __init__(self, trunk):
        super().__init__()
        self.embed_tokens, self.layers, self.norm = trunk.embed_tokens, trunk.layers, trunk.norm

    def __call__(self, tokens, cache=None, embeddings=None):
        out, heard = self.embed_tokens(tokens), []
        for layer, entry in zip(self.layers, cache, strict=True):
            out = layer(out, "causal", cache=entry)
            heard.append(out)
        return self.norm(out + heard[0])


def test_a_trunk_that_hears_every_layer_is_computed_whole(llama):
    teacher, student = load_model(llama), load_model(llama)
    for loaded in (teacher, student):
        loaded.model.model = Residual(loaded.model.model)
    disturb(student, "model.layers.2.mlp.up_proj.weight")
    (found,) = inject(teacher, student, WINDOWS)
    assert found.kl.value == whole(teacher, student, WINDOWS).value > 0


def test_windows_longer_than_a_step(llama, four_bit):
    teacher, student = load_model(llama), load_model(four_bit)
    at_once = list(inject(teacher, student, WINDOWS))
    for found, expected in zip(inject(teacher, student, WINDOWS, step=7), at_once, strict=True):
        assert found.name == expected.name
        assert found.kl.value == pytest.approx(expected.kl.value, rel=1e-3)


def test_every_weight_one_after_the_other_makes_the_student(llama, four_bit):
    assert_made(load_model(llama), load_model(four_bit), 23)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_bias_beside_codes_is_a_weight_of_its_own(dtype, tmp_path):
    folder = make(tmp_path / "qwen2", "qwen2", dtype=dtype)
    teacher, student = load_model(folder, expand="off"), load_model(folder, expand="off")
    for path in ("model.layers.0.self_attn.k_proj", "model.layers.1.self_attn.v_proj"):
        disturb(student, f"{path}.bias")
    nn.quantize(student.model, 32, 4, class_predicate=lambda path, _: path == "model.layers.0.self_attn.k_proj")
    names = [c.name.removeprefix("model.layers.") for c in changes(teacher, student, dtype)]
    assert names == ["0.self_attn.k_proj.weight", "0.self_attn.k_proj.bias", "1.self_attn.v_proj.bias"]
    assert_made(teacher, student, 3)
    found = [row for row in inject(teacher, student, WINDOWS) if "k_proj" in row.name]
    coded, disturbed = load_model(folder, expand="off"), load_model(folder, expand="off")
    nn.quantize(coded.model, 32, 4, class_predicate=lambda path, _: path == "model.layers.0.self_attn.k_proj")
    disturb(disturbed, found[1].name)
    assert [f.kl for f in found] == [whole(teacher, other, WINDOWS) for other in (coded, disturbed)]


def assert_made(teacher: LoadedModel, student: LoadedModel, count: int) -> None:
    """Weights replaced one after the other, none put back, are the student to the bit."""
    found = list(changes(teacher, student, Split(teacher, plan_cache(teacher.model)).dtype))
    made = reduce(lambda model, change: change.of(model), found, teacher.model)
    tokens = mx.array(WINDOWS.tokens_WL)
    assert len(found) == count
    assert mx.array_equal(made(tokens), student.model(tokens))
    assert not mx.array_equal(teacher.model(tokens), student.model(tokens))


@pytest.mark.parametrize("expand", ["auto", "off"])
def test_a_quantized_student(expand, llama, four_bit):
    """Against a swap by hand and logits of the whole model: in float32, and codes among bfloat16 weights."""
    teacher, student = load_model(llama, expand=expand), load_model(four_bit, expand=expand)
    found = {f.name: f for f in inject(teacher, student, WINDOWS)}
    matrices = [n for n in weights(teacher.model) if "norm" not in n]
    assert list(found) == matrices, "what is not quantized is the same"
    before = teacher.model.model.layers[1].mlp.up_proj
    other = load_model(llama, expand=expand)
    other.model.model.layers[1].mlp.up_proj = student.model.model.layers[1].mlp.up_proj
    up = found["model.layers.1.mlp.up_proj.weight"]
    # With a head in bfloat16 the whole model's logits have steps of 2**-7.
    assert up.kl.value == pytest.approx(mean_kl(teacher.model, other.model), rel=1e-3 if expand == "auto" else 0.3)
    assert teacher.model.model.layers[1].mlp.up_proj is before
    assert up.kl.error > 0
    total, all_of_it = sum(f.kl.value for f in found.values()), whole(teacher, student, WINDOWS).value
    assert 0.2 < total / all_of_it < 5


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_gguf_student(family, tmp_path):
    folder = make(tmp_path / family, family, dtype="float16", tied=family == "qwen2")
    teacher, student = load_model(folder), load_model(write_gguf(folder, tmp_path / "tiny.gguf", "Q8_0"))
    found = {f.name: f for f in inject(teacher, student, WINDOWS)}
    assert list(found) == [n for n in weights(teacher.model) if "norm" not in n and not n.endswith("bias")]
    assert all(0 < f.kl.value < 1e-3 for f in found.values())
    assert all(f.kind != "other" for f in found.values())
    exact = load_model(write_gguf(folder, tmp_path / "exact.gguf", "F16"))
    assert list(inject(teacher, exact, WINDOWS)) == []


def test_experts_and_latents_that_are_quantized(tmp_path):
    """Modules of mlx-lm's own, one of them for all experts."""
    for family in ("gpt_oss", "deepseek_v3"):
        folder = make(tmp_path / family, family, dtype="float32")  # MLX's CPU has no half-precision experts
        teacher, student = load_model(folder, expand="off"), load_model(folder, expand="off")
        nn.quantize(student.model, 32, 8)
        found = [f for f in inject(teacher, student, WINDOWS) if "expert" in f.kind or "latent" in f.kind]
        assert len(found) >= 3
        assert all(0 < f.kl.value < 0.05 for f in found)
        biased = [f.name for f in inject(teacher, student, WINDOWS) if f.name.endswith("bias")]
        assert biased == [], "a bias beside codes is a weight of its own, and the same"


def test_other_floats_leave_the_teachers_dtype(tmp_path):
    """Scales in float16 would make all behind them float32 in a bfloat16 model, which hides its own rounding."""
    folder = make(tmp_path / "bfloat16", "llama")
    half = make(tmp_path / "float16", "llama", dtype="float16")
    teacher, student = load_model(folder, expand="off"), load_model(half, expand="off")
    nn.quantize(student.model, 32, 4)
    plan = plan_cache(teacher.model)
    for change in changes(teacher, student, "bfloat16"):
        teacher_with = LoadedModel(change.of(teacher.model), teacher.config, folder, "hf", "", 0)
        assert Split(teacher_with, plan).dtype == "bfloat16", change.name
    names = [f.name for f in inject(teacher, student, WINDOWS)]
    assert len(names) >= 16


def test_the_teacher_is_left_as_it_was(llama, four_bit):
    teacher, student = load_model(llama), load_model(four_bit)
    before = state(teacher.model), state(student.model)
    done = []
    found = inject(teacher, student, WINDOWS, progress=lambda *at: done.append(at))
    next(found), next(found)
    assert (state(teacher.model), state(student.model)) == before
    found.close()
    assert (state(teacher.model), state(student.model)) == before
    assert done[0][1] == 23
    assert [at for at, _ in done] == [1, 2]
    chosen = [row for row in inject(teacher, student, WINDOWS) if row.name.endswith("q_proj.weight")]
    assert [f.layer for f in chosen] == [0, 1, 2]
    assert (state(teacher.model), state(student.model)) == before


@pytest.mark.parametrize("quantized", [False, True])
def test_a_tied_student_of_an_untied_teacher(quantized, tmp_path):
    """The head of its own that the teacher has becomes the student's embedding."""
    untied = make(tmp_path / "untied", "llama")
    teacher, student = load_model(untied, expand="off"), load_model(make(tmp_path / "tied", "llama", tied=True))
    student.model.load_weights([(n, a) for n, a in weights(teacher.model).items() if n != "lm_head.weight"])
    if quantized:
        nn.quantize(student.model.model, 32, 8, class_predicate=lambda path, _: path == "embed_tokens")
    found = list(inject(teacher, student, WINDOWS))
    head = found.pop()
    assert head.name == "lm_head.weight"
    assert [f.name for f in found] == (["model.embed_tokens.weight"] if quantized else [])
    assert head.kl.value == pytest.approx(whole(teacher, student, WINDOWS).value, rel=0.05 if quantized else 1e-12)
    with pytest.raises(PlanError, match=r"untied: has lm_head.weight, .*tied has not"):
        next(inject(student, teacher, WINDOWS))


def test_models_of_another_build_are_refused(llama, tmp_path):
    teacher = load_model(llama)
    for name, options in {"deep": {"layers": 4}, "wide": {"layers": 3, "width": 256}}.items():
        with pytest.raises(PlanError, match=name):
            next(inject(teacher, load_model(make(tmp_path / name, "llama", **options)), WINDOWS))


def test_rows_behind_the_vocabulary(llama):
    """Some checkpoints pad their matrices, and some files have that cut off."""
    teacher, student = load_model(llama), load_model(llama)
    for module in (student.model.model.embed_tokens, student.model.lm_head):
        module.weight = mx.concatenate([module.weight, mx.ones((8, 128))])
    assert list(inject(teacher, student, WINDOWS)) == []
    disturb(student, "lm_head.weight")
    for p, q in ((teacher, student), (student, teacher)):
        (found,) = inject(p, q, WINDOWS)
        assert found.kl == whole(p, q, WINDOWS)
