"""Plans for sources that are quantized already: what is taken over, what is refused, what is said about it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlxquant.codecs.repacked import REPACKED
from mlxquant.codecs.spec import KEEP, affine
from mlxquant.errors import PlanError, UsageError
from mlxquant.files.hf_folder import HFFolder
from mlxquant.plan.plan import Plan, make_plan
from mlxquant.plan.recipe import settings
from tests import tiny

Q4_K, Q6_K = REPACKED["Q4_K"].codec, REPACKED["Q6_K"].codec


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> HFFolder:
    return HFFolder(tiny.make(tmp_path_factory.mktemp("tiny") / "llama"))


def types_of(model: HFFolder, default: str = "Q4_K", **others: str) -> dict[str, str]:
    """A type for each matrix, as llama.cpp gives them; `others`: by the last word of the module."""
    matrices = [name for name, spec in model.specs.items() if len(spec.shape) == 2]
    return {name: others.get(name.split(".")[-2], default) for name in matrices}


def plan(model: HFFolder, quantized: dict[str, str], **asked: object) -> Plan:
    return make_plan(model.config, model.specs, settings(**asked), quantized)  # type: ignore[arg-type]


def test_each_tensor_becomes_what_its_type_becomes(model: HFFolder) -> None:
    made = plan(model, types_of(model, down_proj="Q6_K"), recipe="repack")
    for tensor in made.tensors:
        if len(tensor.target.shape) == 2:
            down = "down_proj" in tensor.name
            assert (tensor.repack, tensor.codec) == (("Q6_K", Q6_K) if down else ("Q4_K", Q4_K)), tensor.name
        else:
            assert (tensor.repack, tensor.codec) == (None, KEEP)
    assert made.base == Q4_K
    block = made.quantization_config()
    assert block["model.layers.0.mlp.down_proj"] == Q6_K.mlx_config()
    assert "model.layers.0.mlp.up_proj" not in block


def test_the_plan_states_what_each_tensor_costs(model: HFFolder) -> None:
    made = plan(model, types_of(model, down_proj="Q6_K"), recipe="repack")
    stated = {t["name"]: t for t in made.to_json()["tensors"]}
    down = stated["model.layers.0.mlp.down_proj.weight"]
    assert (down["repacked_from"], down["codec"]) == ("Q6_K", "8g32")
    assert 0 < down["nmse_added"] < 0.05 * down["nmse_of_format"]
    assert "nmse_added" not in stated["model.norm.weight"]
    assert any("Q4_K -> 4g32: codes unchanged" in remark for remark in made.remarks)
    assert any("Q6_K -> 8g32: adds" in remark for remark in made.remarks)
    json.dumps(made.to_json())


def test_float_tensors_of_a_quantized_file_stay_float(model: HFFolder) -> None:
    quantized = {name: kind for name, kind in types_of(model).items() if "down_proj" not in name}
    made = plan(model, quantized, recipe="repack")
    assert all(t.codec == KEEP and t.repack is None for t in made.tensors if "down_proj" in t.name)


def test_a_second_loss_is_refused_until_it_is_asked_for(model: HFFolder) -> None:
    quantized = types_of(model)
    with pytest.raises(PlanError, match=r"quantized already.*6g64 would add a second loss") as error:
        plan(model, quantized)
    assert "--recipe repack" in str(error.value.hint)
    with pytest.raises(PlanError) as error:
        plan(model, dict.fromkeys(quantized, "4g64"))
    assert "full-precision" in str(error.value.hint)
    assert plan(model, quantized, requantize=True).base == affine(4, 64)


def test_set_takes_a_tensor_out_of_repacking(model: HFFolder) -> None:
    made = plan(model, types_of(model), recipe="repack", sets=("lm_head=keep",))
    head = next(t for t in made.tensors if t.name == "lm_head.weight")
    assert (head.repack, head.codec) == (None, KEEP)
    with pytest.raises(PlanError, match=r"lm_head.weight is Q4_K"):
        plan(model, types_of(model), recipe="repack", sets=("lm_head=8g64",))


def test_repack_needs_blocks_and_takes_no_bits(model: HFFolder, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no quantized GGUF blocks"):
        plan(model, {}, recipe="repack")
    for asked in ({"bits": 4}, {"group_size": 32}, {"mode": "mxfp4"}, {"dtype": "bfloat16"}):
        with pytest.raises(UsageError, match="keeps the file's own formats"):
            settings(recipe="repack", **asked)  # type: ignore[arg-type]
