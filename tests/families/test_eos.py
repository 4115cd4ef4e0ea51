"""End ids: the union of every source, against what stock mlx-lm and transformers read from the same
folder."""

from __future__ import annotations

import json

import pytest

from mlxquant.errors import SourceError
from mlxquant.families.eos import eos_ids, stock_eos
from tests import tiny

TOKENIZER = {
    "added_tokens": [
        {"id": 7, "content": "<|endoftext|>"}, {"id": 8, "content": "<|im_start|>"},
        {"id": 9, "content": "<|im_end|>"}, {"id": 10, "content": "<|eot_id|>"},
        {"id": 11, "content": "<|end|>"}, {"id": 12, "content": "<|return|>"},
    ],
    "model": {"vocab": {"</s>": 2, "a": 3}},
}  # fmt: skip
CHATML = "<|im_start|>{{ role }}\n{{ content }}<|im_end|>\n"


def test_every_source_counts():
    found = eos_ids(
        {"eos_token_id": 1, "text_config": {"eos_token_id": [4, 5]}}, {"eos_token_id": [6, 1]},
        {"eos_token": "<|endoftext|>"}, TOKENIZER, CHATML,
    )  # fmt: skip
    assert found == (1, 4, 5, 6, 7, 9)


@pytest.mark.parametrize("token", ["</s>", {"content": "</s>", "special": True}])
def test_the_tokenizers_token_is_looked_up_in_the_vocabulary(token):
    assert eos_ids({}, {}, {"eos_token": token}, TOKENIZER, "") == (2,)


def test_a_unigram_vocabulary_is_a_list():
    assert eos_ids({}, {}, {"eos_token": "</s>"}, {"model": {"vocab": [["<unk>", 0.0], ["</s>", 0.0]]}}, "") == (1,)


def test_without_tokenizer_json_the_declared_added_tokens_tell():
    declared = {
        "eos_token": "<e>",
        "added_tokens_decoder": {"3": {"content": "<e>"}, "x": {}, "4": {"content": "b"}},
    }
    assert eos_ids({}, {}, declared, {}, "") == (3,)


def test_a_turn_token_counts_only_when_template_and_tokenizer_have_it():
    assert eos_ids({}, {}, {}, TOKENIZER, "<|eot_id|> <|eom_id|>") == (10,)
    assert eos_ids({}, {}, {}, TOKENIZER, "plain text") == ()


def test_gpt_oss_closes_a_message_without_ending_the_answer():
    template = "<|start|>assistant<|channel|>analysis<|message|>x<|end|> ... <|return|>"
    assert eos_ids({}, {}, {}, TOKENIZER, template) == (12,)
    assert eos_ids({}, {}, {}, TOKENIZER, "<|user|>x<|end|>") == (11,)  # Phi


def test_nothing_anywhere_is_empty():
    assert eos_ids({"eos_token_id": None}, {}, {"eos_token": None}, {}, "") == ()


@pytest.mark.parametrize(
    ("files", "named"),
    [
        (({"eos_token_id": "2"}, {}, {}, {}), "config.json: eos_token_id"),
        (({"eos_token_id": [1, None]}, {}, {}, {}), "config.json: eos_token_id"),
        (({"eos_token_id": True}, {}, {}, {}), "config.json: eos_token_id"),
        (({"eos_token_id": -1}, {}, {}, {}), "config.json: eos_token_id"),
        (({"text_config": {"eos_token_id": 1.5}}, {}, {}, {}), "text_config: eos_token_id"),
        (({}, {"eos_token_id": {}}, {}, {}), "generation_config.json: eos_token_id"),
        (({}, {}, {"eos_token": 5}, {}), "tokenizer_config.json: eos_token"),
        (({}, {}, {"eos_token": {"id": 1}}, {}), "tokenizer_config.json: eos_token"),
        (({}, {}, {}, {"added_tokens": {}}), None),
        (({}, {}, {}, {"added_tokens": "x"}), "tokenizer.json: added_tokens"),
        (({}, {}, {}, {"added_tokens": [{"id": "1", "content": "a"}]}), "tokenizer.json: added_tokens"),
        (({}, {}, {}, {"added_tokens": [7]}), "tokenizer.json: added_tokens"),
    ],
)
def test_ill_typed_values_name_file_and_key(files, named):
    if named is None:
        assert eos_ids(*files, "") == ()
        return
    with pytest.raises(SourceError, match=named):
        eos_ids(*files, "")


@pytest.mark.parametrize("generation", [{"eos_token_id": 0}, {"eos_token_id": [2, 1]}, {}, {"eos_token_id": None}])
@pytest.mark.parametrize("config", [2, [1, 2]])
def test_stock_eos_is_what_stock_mlx_lm_stops_at(tmp_path, generation, config):
    from mlx_lm.utils import load

    path = tiny.make(tmp_path / "m", layers=1, eos_token_id=config)
    (path / "generation_config.json").write_text(json.dumps(generation))
    files = [json.loads((path / n).read_text()) for n in ("config.json", "generation_config.json")]
    tokenizer_files = [json.loads((path / n).read_text()) for n in ("tokenizer_config.json", "tokenizer.json")]
    _, tokenizer = load(str(path), lazy=True)
    assert set(stock_eos(*files, *tokenizer_files)) == tokenizer.eos_token_ids
    assert set(stock_eos(*files)) <= set(stock_eos(*files, *tokenizer_files))
