"""What each recipe decides, and what the plan refuses, without a single weight being read."""

from __future__ import annotations

import pytest

from mlxquant.codecs.spec import KEEP, affine, parse_codec
from mlxquant.convert.sources import open_source
from mlxquant.errors import PlanError, UnsupportedError, UsageError
from mlxquant.families.roles import SENSITIVE, VOCABULARY, Role
from mlxquant.plan.plan import make_plan
from mlxquant.plan.recipe import fit_group, settings
from mlxquant.tensors import TensorSpec
from tests.tiny import make


def plan_for(folder, config=None, **wanted):
    source = open_source(folder)
    return make_plan(source.config | (config or {}), source.specs, settings(**wanted))


def codecs(plan):
    return {t.name: t.codec for t in plan.tensors}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make(tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_balanced_keeps_embedding_and_head_at_six_bits(tmp_path, bits, tied):
    plan = plan_for(make(tmp_path / "m", tied=tied), bits=bits)
    vocabulary = [t for t in plan.tensors if t.role in VOCABULARY]
    assert len(vocabulary) == (1 if tied else 2)
    assert {t.codec.bits for t in vocabulary} == {6}
    assert {t.codec.bits for t in plan.tensors if t.codec.quantized and t.role not in VOCABULARY} == {bits}


def test_balanced_keeps_routers_at_eight_bits(tmp_path):
    plan = plan_for(make(tmp_path / "m", "qwen2_moe"), bits=2, group_size=32)
    sensitive = [t for t in plan.tensors if t.role in SENSITIVE]
    assert {t.role for t in sensitive} >= {Role.ROUTER, Role.SHARED_GATE}
    assert all(not t.codec.quantized or t.codec.bits >= 8 for t in sensitive)


def test_balanced_under_an_mx_mode_falls_back_to_affine_for_the_head(llama):
    plan = plan_for(llama, mode="mxfp4")
    assert codecs(plan)["lm_head.weight"] == affine(6, 64)
    assert codecs(plan)["model.layers.0.mlp.up_proj.weight"] == parse_codec("mxfp4")


def test_norms_and_biases_stay_float(tmp_path):
    plan = plan_for(make(tmp_path / "m", "qwen2"))
    assert all(t.codec == KEEP for t in plan.tensors if len(t.target.shape) == 1)


def test_the_first_matching_set_wins(llama):
    found = codecs(plan_for(llama, sets=("layers.0.mlp.down_proj=keep", "down_proj=8g32")))
    assert found["model.layers.0.mlp.down_proj.weight"] == KEEP
    assert found["model.layers.1.mlp.down_proj.weight"] == affine(8, 32)


def test_a_set_that_matches_nothing_is_refused(llama):
    with pytest.raises(PlanError, match="matches no tensor"):
        plan_for(llama, sets=("dwon_proj=8g32",))


@pytest.mark.parametrize("pattern", ["norm", r"model\.norm", "bias|norm"])
def test_a_set_that_could_change_nothing_is_refused(llama, pattern):
    with pytest.raises(PlanError, match="only tensors that MLX keeps float, such as model"):
        plan_for(llama, sets=(f"{pattern}=8g32",))
    plan_for(llama, sets=(f"{pattern}=keep",))


def test_a_set_may_match_a_norm_beside_what_it_changes(llama):
    found = codecs(plan_for(llama, sets=("layers.0=8g32",)))
    assert found["model.layers.0.mlp.down_proj.weight"] == affine(8, 32)
    assert found["model.layers.0.input_layernorm.weight"] == KEEP


@pytest.mark.parametrize("dtype", [["bfloat16"], {}, 16, "float8"])
def test_a_dtype_of_no_sense_in_the_config_gives_way_to_the_weights(llama, dtype):
    assert plan_for(llama, {"torch_dtype": dtype}).dtype == "BF16"


def test_a_set_whose_group_does_not_divide_is_refused(tmp_path):
    with pytest.raises(PlanError, match=r"width 96 is not a multiple of 64"):
        plan_for(make(tmp_path / "m", width=96), group_size=32, sets=("q_proj=8g64",))


def test_a_smaller_group_steps_in_where_it_divides(tmp_path):
    plan = plan_for(make(tmp_path / "m", width=192), group_size=128)
    assert codecs(plan)["model.layers.0.self_attn.q_proj.weight"] == affine(4, 64)
    assert any("width 192" in remark and "becomes 4g64" in remark for remark in plan.remarks)


def test_bits_that_are_not_reached_are_an_error(tmp_path):
    folder = make(tmp_path / "m", width=192)
    with pytest.raises(PlanError, match="4g128 is not reached") as error:
        plan_for(folder, group_size=128, recipe="uniform")
    assert "--group-size 64" in (error.value.hint or "")


def test_a_width_no_group_divides_can_be_left_float_knowingly(tmp_path):
    folder = make(tmp_path / "m", width=80)
    with pytest.raises(PlanError, match=r"widths \[80, 160\]|widths \[80"):
        plan_for(folder, group_size=32)
    plan = plan_for(folder, group_size=32, sets=("q_proj|k_proj|v_proj|gate_proj|up_proj|down_proj=keep",))
    assert codecs(plan)["model.layers.0.self_attn.o_proj.weight"] == affine(4, 32)


def test_an_unknown_tensor_is_refused_by_name(llama):
    source = open_source(llama)
    specs = dict(source.specs)
    name = "model.layers.0.self_attn.surprise.weight"
    specs[name] = TensorSpec(name, (128,), "BF16")
    with pytest.raises(UnsupportedError, match="surprise"):
        make_plan(source.config, specs, settings())


@pytest.mark.parametrize(
    "scheme",
    [
        {"quant_method": "fp8", "fmt": "e4m3"},
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        {"group_size": 64, "bits": 4},
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_a_quantized_source_is_named_and_refused(llama, scheme, nested):
    config = {"text_config": {"quantization_config": scheme}} if nested else {"quantization_config": scheme}
    with pytest.raises(UnsupportedError, match=scheme.get("quant_method", "MLX")):
        plan_for(llama, config)


def test_planned_bytes_are_the_parts_bytes(llama):
    plan = plan_for(llama, bits=3)
    assert plan.nbytes == sum(part.nbytes for t in plan.tensors for part in t.parts)
    assert sum(plan.bytes_by_role().values()) == plan.nbytes
    assert plan.bpw == pytest.approx(8 * plan.nbytes / plan.size)


def test_the_digest_tells_plans_apart(llama):
    assert plan_for(llama).digest() == plan_for(llama).digest()
    assert plan_for(llama).digest() != plan_for(llama, bits=5).digest()


def test_layers_that_differ_are_declared(llama):
    block = plan_for(llama, sets=("layers.1.mlp.down_proj=8g32",)).quantization_config()
    assert {k: block[k] for k in ("bits", "group_size", "mode")} == {"bits": 4, "group_size": 64, "mode": "affine"}
    assert block["model.layers.1.mlp.down_proj"] == {"group_size": 32, "bits": 8, "mode": "affine"}
    assert block["lm_head"]["bits"] == 6


@pytest.mark.parametrize(
    "wanted",
    [
        {"mode": "mxfp4", "bits": 3},
        {"mode": "nvfp4", "recipe": "mixed_3_6"},
        {"recipe": "mixed_3_6", "bits": 5},
        {"dtype": "float8"},
        {"sets": ("no-equals-sign",)},
        {"sets": ("([=8g32",)},
        {"sets": ("x=9g32",)},
        {"method": "magic"},
        {"method": "search", "mode": "nvfp4"},
        {"method": "gptq", "recipe": "repack"},
    ],
)
def test_contradictions_are_usage_errors(wanted):
    with pytest.raises(UsageError):
        settings(**wanted)


def test_who_chooses_codes_is_said_and_told_apart(llama):
    """rtn is not said: digests of plans from before there was a choice stay."""
    default, rtn = plan_for(llama), plan_for(llama, method="rtn")
    assert default.to_json()["settings"]["method"] == "search"
    assert "method" not in rtn.to_json()["settings"]
    assert default.digest() == plan_for(llama, method="search").digest() != rtn.digest()


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({}, "search"),
        ({"mode": "mxfp4"}, "search"),
        ({"mode": "nvfp4"}, "rtn"),
        ({"bits": 2}, "rtn"),  # where least squares is not least divergence
        ({"bits": 3}, "search"),
        ({"recipe": "uniform"}, "rtn"),
        ({"recipe": "mixed_3_6"}, "rtn"),
        ({"recipe": "repack"}, "rtn"),
        ({"recipe": "uniform", "method": "search"}, "search"),
    ],
)
def test_what_promises_the_bytes_of_others_is_not_searched_unasked(wanted, expected):
    assert settings(**wanted).method == expected


@pytest.mark.parametrize(("width", "expected"), [(256, "4g128"), (192, "4g64"), (96, "4g32"), (80, "keep")])
def test_fit_group(width, expected):
    assert fit_group(affine(4, 128), width).label == expected


def test_codecs_by_name_decide_alone(llama):
    chosen = {"model.layers.0.mlp.down_proj.weight": "8g32", "lm_head.weight": "2g128"}
    made = plan_for(llama, codecs=tuple(chosen.items()), sets=("down_proj=keep",))
    found = codecs(made)
    assert {name: found[name].label for name in chosen} == chosen
    assert found["model.layers.1.mlp.down_proj.weight"] == KEEP
    assert made.to_json()["settings"]["codecs"] == [list(pair) for pair in chosen.items()]
    assert made.digest() != plan_for(llama, sets=("down_proj=keep",)).digest()


@pytest.mark.parametrize(("name", "codec"), [("model.layers.7.mlp.down_proj.weight", "4g64"), ("lm_head", "4g64")])
def test_a_codec_for_a_tensor_that_is_not_there_is_refused(llama, name, codec):
    with pytest.raises(PlanError, match="which this model has not"):
        plan_for(llama, codecs=((name, codec),))
