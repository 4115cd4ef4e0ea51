"""Whatever a config holds, it is a layout or one of our errors in one line: no crash, no endless loop."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlxquant.errors import SourceError
from mlxquant.families.eos import eos_ids, stock_eos
from mlxquant.families.known import FACTS
from mlxquant.families.mlx_layout import layout
from mlxquant.families.roles import assign_roles
from mlxquant.families.shape import ModelShape
from tests import tiny
from tests.families import checkpoints

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
VALUES = JSON | st.sampled_from([0, 1, 2, 3, 64, 128, 512, 2**31 - 1, 4096, "full_attention", ["full_attention"] * 4])
BOUNDED = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
@BOUNDED
@given(data=st.data())
def test_any_value_under_any_key(family, data):
    path = checkpoints.folder(family, family in tiny.ALWAYS_TIED)
    config, specs = checkpoints.config(path), checkpoints.specs(path)
    module = "llama" if family == "mistral" else family
    keys = sorted(
        {*config, *config.get("text_config", {}), *FACTS[module].defaults, "rope_parameters"} - {"model_type"}
    )
    for _ in range(data.draw(st.integers(1, 2))):
        config[data.draw(st.sampled_from(keys))] = data.draw(VALUES)
    message = ""
    try:
        made = layout(config, specs)
    except SourceError as error:
        message = error.message
    else:
        roles = assign_roles(made.targets, ModelShape.from_config(config))
        assert set(roles) == {t.name for t in made.targets}
    assert "\n" not in message
    assert len(message) < 1500


@BOUNDED
@given(st.dictionaries(st.sampled_from(["eos_token_id", "text_config", "eos_token"]), JSON), JSON, JSON, JSON)
def test_any_tokenizer_files(config, generation, added, vocab):
    declared = {"eos_token": "</s>", "added_tokens_decoder": added}
    tokenizer = {"added_tokens": added, "model": {"vocab": vocab}}
    for tokenizer_json in (tokenizer, {"model": vocab}, {}):
        message = ""
        try:
            found = eos_ids(config, {"eos_token_id": generation}, declared, tokenizer_json, "</s>")
            stock_eos(config, {"eos_token_id": generation}, declared, tokenizer_json)
        except SourceError as error:
            message = error.message
        else:
            assert json.dumps(found)
        assert "\n" not in message
