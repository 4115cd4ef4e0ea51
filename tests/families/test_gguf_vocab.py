"""tokenizer.* keys from a folder's files against what llama.cpp's converter wrote for the same folder."""

from __future__ import annotations

import json
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from mlxquant.errors import SourceError, UnsupportedError, UsageError
from mlxquant.families.gguf import token_ids
from mlxquant.families.gguf_bpe import decoded
from mlxquant.families.gguf_metadata import Metadata
from mlxquant.families.gguf_spm import read_pieces
from mlxquant.families.gguf_tokenizer import tokenizer_files
from mlxquant.families.gguf_vocab import vocabulary_keys
from tests import oracle
from tests.families.gguf_page import PAGE
from tests.families.vocab_cases import CASES, FIXTURES, Case, bpe, config, pieces, spm, summary
from tests.gguf_files import CONTROL, NORMAL, UNKNOWN, UNUSED, LlamaCpp, write_vocabulary

EXPECTED = json.loads((FIXTURES / "expected.json").read_bytes())
PRE = "tokenizer.ggml.pre"
SPM_CASES = [name for name, (_, files) in CASES.items() if "tokenizer.model" in files]


@pytest.mark.parametrize("name", CASES)
def test_keys_are_the_converters(name: str) -> None:
    keys, expected = summary(vocabulary_keys(*CASES[name])), EXPECTED[name]
    if expected[PRE] == ["STRING", "any"]:  # it knows names only of published vocabularies
        expected = expected | {PRE: keys[PRE]}
        assert keys[PRE][1] == ("deepseek-r1-qwen" if keys.get("tokenizer.ggml.add_bos_token", [0, 0])[1] else "qwen2")
    assert list(keys) == list(expected)
    assert keys == expected


def test_the_cases_differ() -> None:
    """So a key that is written without a look at the files shows."""
    assert len({json.dumps(case) for case in EXPECTED.values()}) > 30
    assert {key for case in EXPECTED.values() for key in case} >= {
        f"tokenizer.ggml.{key}"
        for key in ("add_bos_token", "add_eos_token", "add_sep_token", "add_space_prefix", "eot_token_id", "merges",
                    "padding_token_id", "scores", "seperator_token_id", "unknown_token_id")
    }  # fmt: skip


def without(case: Case, *names: str) -> Case:
    return case[0], {name: data for name, data in case[1].items() if name not in names}


def arrays(keys: dict[str, Any]) -> dict[str, Any]:
    ours = {k: v for k, v in keys.items() if k.startswith("tokenizer.ggml.")}
    return {k: v.tobytes() if isinstance(v, np.ndarray) else v for k, v in ours.items()}


@pytest.mark.parametrize("family", ["llama", "mixtral", "gemma", "gemma3_text", "phi3"])
def test_without_its_tokenizer_model_a_vocabulary_is_the_same(family: str) -> None:
    """tokenizer.json holds the order of scores, and transformers trains none of them anew."""
    listed = json.loads((FIXTURES / "spm.json").read_bytes())["added_tokens"]
    decoder = {str(t["id"]): {"content": t["content"], "special": t["special"]} for t in listed}
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    case = spm(family, names | {"added_tokens_decoder": decoder}, vocab_size=pieces() + 5)
    assert arrays(vocabulary_keys(*without(case, "tokenizer.model"))) == arrays(vocabulary_keys(*case))


def test_runs_of_spaces_that_come_last_have_llamas_score() -> None:
    tokenizer = json.loads((FIXTURES / "spm.json").read_bytes())
    vocab, merges = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
    tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if t["content"] != "▁▁"]
    tokenizer["model"]["merges"] = [m for m in merges if "".join(m).strip("▁")] + [["▁", "▁"]]
    assert vocab["▁▁"] < vocab["▁t"]
    keys = vocabulary_keys(config("llama", vocab_size=len(vocab)), {"tokenizer.json": json.dumps(tokenizer).encode()})
    scores = keys["tokenizer.ggml.scores"]
    assert [scores[vocab[t]] for t in ("▁▁", "▁", "▁t", "▁a")] == [np.float32(-1e9), np.float32(-1e9), -1, -2]


def test_scores_follow_merges_where_ids_do_not() -> None:
    tokenizer = json.loads((FIXTURES / "spm.json").read_bytes())
    vocab, merges = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
    last = "".join(merges[-1])
    tokenizer["model"]["merges"] = [merges[-1], *merges[:-1]]
    keys = vocabulary_keys(config("llama", vocab_size=len(vocab)), {"tokenizer.json": json.dumps(tokenizer).encode()})
    scores = keys["tokenizer.ggml.scores"]
    assert scores[vocab[last]] == 0
    assert scores[vocab["▁t"]] == -1


# Left out: tokens that the decoder changes, twice there and back; one that is no bytes' letters (spaces); a BOS before
# each text that has no id (gpt_oss-silent); <pad>, which looks special, as an author's token (llama2-legacy);
# padding between tokens (phi3), which becomes tokens in a vocabulary without holes.
TWICE = {"phi3", "llama2-legacy", "decoder", "legacy", "spaces", "gpt_oss-silent"}
TWICE |= {"odd", "odd-normalized", "odd-special"}


@pytest.mark.parametrize("name", sorted(CASES.keys() - TWICE))
def test_there_and_back(name: str) -> None:
    """The files that are made of the keys say the same again, a GGUF -> MLX -> GGUF."""
    settings, files = CASES[name]
    keys = vocabulary_keys(settings, files)
    settings = {k: v for k, v in settings.items() if not k.endswith("_token_id")} | token_ids(Metadata(keys))
    back = vocabulary_keys(settings | {"vocab_size": len(keys["tokenizer.ggml.tokens"])}, tokenizer_files(keys))
    for key in ("model", "pre", "tokens", "merges", "bos_token_id", "eos_token_id", "add_space_prefix"):
        found, wanted = (side.get(f"tokenizer.ggml.{key}") for side in (back, keys))
        assert found == wanted or (key, wanted, found) in HELD_TO_BE_SO, key
    # A tokenizer.json knows an unknown token only as a special one.
    kinds = [np.where(side["tokenizer.ggml.token_type"] == UNKNOWN, CONTROL, side["tokenizer.ggml.token_type"])
             for side in (back, keys)]  # fmt: skip
    assert np.array_equal(*kinds)
    assert back.get("tokenizer.chat_template") == keys.get("tokenizer.chat_template")
    if "tokenizer.ggml.scores" in back:
        scores = (side["tokenizer.ggml.scores"][kinds[0] == NORMAL] for side in (back, keys))
        assert np.array_equal(*(np.argsort(-part, kind="stable") for part in scores))


# What is the same to llama.cpp: SentencePiece prepends a space unless told not to, and takes ids 1 and 2.
HELD_TO_BE_SO = [("add_space_prefix", None, True), ("add_space_prefix", True, None), ("add_space_prefix", None, False),
                 ("add_space_prefix", False, None), ("bos_token_id", None, 1), ("eos_token_id", None, 2)]  # fmt: skip


TEXTS = [PAGE, *PAGE.split("\n"), "a  b", " x", "<user>x\n\ny", "<|endoftext|>in<tool_call> the"]


@pytest.mark.parametrize("name", ["llama3", "qwen2", "olmo2", "llama2", "llama2-json", "gemma", "gemma-json"])
def test_llama_cpp_makes_the_tokenizers_ids(name: str, tmp_path: Path) -> None:
    """What all of this is for: llama.cpp on our keys against `tokenizers` on the folder's tokenizer.json."""
    family = name.removesuffix("-json")
    case = {"olmo2": bpe("olmo2"), "llama3": _llama3(), "gemma": _gemma()}.get(family) or CASES[family]
    keys = vocabulary_keys(*(without(case, "tokenizer.model") if name.endswith("json") else case))
    tokens = keys.pop("tokenizer.ggml.tokens")
    plain = {k.replace(".", "__"): _plain(v) for k, v in keys.items() if not k.startswith("tokenizer.chat")}
    llama_cpp = LlamaCpp(write_vocabulary(tmp_path / "a.gguf", tokens, **plain))
    tokenizer = Tokenizer.from_str(case[1]["tokenizer.json"].decode())
    starts = keys.get("tokenizer.ggml.add_bos_token", keys["tokenizer.ggml.model"] == "llama")
    for text in filter(None, (unicodedata.normalize("NFC", text) for text in TEXTS)):
        if name.startswith("llama2") and (" " in text[0] or "  " in text or "<" in text):
            continue  # llama.cpp puts a space before each text and behind each added token, the new Llama tokenizer not
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        bos = [int(keys["tokenizer.ggml.bos_token_id"])] if starts else []
        assert llama_cpp.tokenize(text) == bos + ids, text[:60]


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else int(value) if isinstance(value, np.integer) else value


def _llama3() -> Case:
    expression = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    expression += r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    split = {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    steps = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    case = CASES["llama3"]
    tokenizer = json.loads(case[1]["tokenizer.json"]) | {"pre_tokenizer": steps, "normalizer": None}
    made = case[0], case[1] | {"tokenizer.json": json.dumps(tokenizer).encode()}
    assert vocabulary_keys(*made)[PRE] == "llama-bpe"
    return made


def _gemma() -> Case:
    tokenizer = json.loads((FIXTURES / "spm.json").read_bytes())
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    tokenizer["pre_tokenizer"] = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious",
                                  "invert": False}  # fmt: skip
    listed = {str(t["id"]): {"content": t["content"], "special": t["special"]} for t in tokenizer["added_tokens"]}
    case = spm("gemma", {"bos_token": "<s>", "eos_token": "</s>", "added_tokens_decoder": listed})
    return case[0], case[1] | {"tokenizer.json": json.dumps(tokenizer).encode()}


def test_templates_come_from_where_transformers_takes_them() -> None:
    """The converter takes tokenizer_config.json's first, which people forget when they mend the .jinja file."""
    names = {"bos_token": "<|endoftext|>", "chat_template": "old"}
    for files, expected in (
        ({"chat_template.jinja": b"new"}, "new"),
        ({"chat_template.json": b'{"chat_template": "json"}'}, "old"),
    ):
        assert vocabulary_keys(*bpe("qwen2", names, files))["tokenizer.chat_template"] == expected
    files = {"chat_template.jinja": b"alone"}
    assert vocabulary_keys(*bpe("qwen2", None, files))["tokenizer.chat_template"] == "alone"
    assert "tokenizer.chat_template" not in vocabulary_keys(*bpe("qwen2"))


def test_ids_without_a_token_are_left_out() -> None:
    ids = {"pad_token_id": 4000, "bos_token_id": -1, "eos_token_id": 1}
    keys = vocabulary_keys(*bpe("qwen2", {}, settings=ids))
    assert {k: int(v) for k, v in keys.items() if k.endswith("_token_id")} == {"tokenizer.ggml.eos_token_id": 1}


def test_a_named_token_without_a_row_is_left_out() -> None:
    keys = vocabulary_keys(*bpe("qwen2", {"eos_token": "<|eos|>", "pad_token": "[PAD]"}))
    assert "[PAD]" not in keys["tokenizer.ggml.tokens"]
    padded = vocabulary_keys(*bpe("qwen2", {"pad_token": "[PAD]"}, settings={"vocab_size": 370}))
    assert padded["tokenizer.ggml.tokens"][360:362] == ["[PAD]", "[PAD361]"]
    assert list(padded["tokenizer.ggml.token_type"][360:362]) == [CONTROL, UNUSED]


def test_a_size_that_the_config_leaves_open_is_transformers() -> None:
    settings, files = bpe("qwen2")
    del settings["vocab_size"]
    assert len(vocabulary_keys(settings, files)["tokenizer.ggml.tokens"]) == 151936
    settings["model_type"] = "brand-new"
    assert len(vocabulary_keys(settings, files)["tokenizer.ggml.tokens"]) == 360


def test_a_tokenizer_model_of_tiktoken_is_not_read() -> None:
    settings, files = CASES["llama3"]
    more = files | {"tokenizer.model": b"IQ== 0\nIg== 1\n"}
    assert summary(vocabulary_keys(settings, more)) == summary(vocabulary_keys(settings, files))


def test_text_config_counts() -> None:
    inner, files = CASES["gemma3"]
    outer = {"model_type": "gemma3", "text_config": inner}
    assert summary(vocabulary_keys(outer, files)) == summary(vocabulary_keys(inner, files))


@pytest.mark.parametrize(
    ("token", "text"),
    [("<|im_end|>", "<|im_end|>"), ("Ġx", " x"), ("é", "�"), ("ÃĦ", "Ä"), (" y", " y"), ("日", "日"), ("", "")],
)
def test_what_the_decoder_prints(token: str, text: str) -> None:
    from tokenizers import decoders

    assert decoded(token) == text == decoders.ByteLevel().decode([token])


def test_a_name_can_be_given() -> None:
    strange = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    case = bpe("llama", pre_tokenizer=strange)
    with pytest.raises(UnsupportedError, match="add_prefix_space") as caught:
        vocabulary_keys(*case)
    assert "--pre NAME" in str(caught.value.hint)
    assert vocabulary_keys(*case, pre="falcon")[PRE] == "falcon"
    with pytest.raises(UsageError, match="'brand-new' is no pre-tokenizer"):
        vocabulary_keys(*case, pre="brand-new")
    with pytest.raises(UsageError, match="SentencePiece"):
        vocabulary_keys(*CASES["llama2"], pre="qwen2")


def test_nothing_heavy_is_loaded(tmp_path: Path) -> None:
    """`convert --dry-run` reads vocabularies."""
    program = (
        "import sys\n"
        "from tests.families.vocab_cases import CASES\n"
        "from mlxquant.families.gguf_vocab import vocabulary_keys\n"
        "for name in ('llama3', 'llama2', 'odd'): vocabulary_keys(*CASES[name])\n"
        "print(sorted({'tokenizers', 'transformers', 'mlx', 'numba', 'gguf', 'sentencepiece'} & sys.modules.keys()))\n"
    )
    root = Path(__file__).parent.parent.parent
    said = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True).stdout
    assert said.strip() == "[]"


def edited(case: Case, file: str, **entries: Any) -> Case:
    value = json.loads(case[1].get(file, b"{}")) | entries
    return case[0], case[1] | {file: json.dumps(value).encode()}


def settings_(**entries: Any) -> Case:
    return edited(CASES["qwen2"], "tokenizer_config.json", **entries)


def json_(**entries: Any) -> Case:
    return edited(CASES["qwen2"], "tokenizer.json", **entries)


def model(**entries: Any) -> Case:
    case = CASES["qwen2"]
    return edited(case, "tokenizer.json", model=json.loads(case[1]["tokenizer.json"])["model"] | entries)


def token(**entries: Any) -> Case:
    return json_(added_tokens=[{"id": 0, "content": "<|endoftext|>"} | entries])


def with_file(name: str, data: bytes, case: str = "qwen2") -> Case:
    return CASES[case][0], CASES[case][1] | {name: data}


def damaged(pieces: bytes) -> Case:
    return with_file("tokenizer.model", pieces, "llama2")


def with_config(case: str = "qwen2", **entries: Any) -> Case:
    return CASES[case][0] | entries, CASES[case][1]


HOSTILE: dict[str, tuple[Case, type[SourceError], str]] = {
    "not JSON": (with_file("tokenizer.json", b"{"), SourceError, r"tokenizer\.json: not JSON"),
    "deep": (with_file("tokenizer.json", b"[" * 100_000), SourceError, r"tokenizer\.json: not JSON"),
    "not UTF-8": (with_file("tokenizer.json", b'{"a": "\xff"}'), SourceError, r"tokenizer\.json: not JSON"),
    "an array": (with_file("tokenizer.json", b"[]"), SourceError, r"the file is \[\], expected an object"),
    "no tokenizer": (without(CASES["qwen2"], "tokenizer.json"), UnsupportedError, r"tokenizer\.json is missing"),
    "template bytes": (with_file("chat_template.jinja", b"\xff"), SourceError, r"chat_template\.jinja: not UTF-8"),
    "template type": (settings_(chat_template=7), SourceError, "chat_template is 7"),
    "template names": (settings_(chat_template=[{"name": 1}]), SourceError, "a string"),
    "no model": (json_(model=None), SourceError, "model.merges"),
    "model type": (model(type="Unigram"), UnsupportedError, "model.type 'Unigram'"),
    "vocab list": (model(vocab=["a"]), SourceError, r"model\.vocab is \['a'\], expected an object"),
    "id text": (model(vocab={"a": "1"}), SourceError, "an id in model.vocab is '1'"),
    "id bool": (model(vocab={"a": True}), SourceError, "an id in model.vocab is True"),
    "id float": (model(vocab={"a": 1.0}), SourceError, "an id in model.vocab is 1.0"),
    "id negative": (model(vocab={"a": -1}), SourceError, "an id in model.vocab is -1"),
    "id huge": (model(vocab={"a": 2**60}), SourceError, "an id in model.vocab is 1152921504606846976"),
    "ids twice": (model(vocab={"a": 5, "b": 5}), SourceError, "two tokens with one id"),
    "half a pair": (model(vocab={"\ud800": 5}), SourceError, "half a surrogate pair"),
    "prefix": (model(continuing_subword_prefix="##"), UnsupportedError, "continuing_subword_prefix '##'"),
    "fallback": (model(byte_fallback=True), UnsupportedError, "decoder"),
    "no merges": (model(merges=[]), SourceError, r"model\.merges is \[\]"),
    "merge of one": (model(merges=[["a"]]), SourceError, r"a pair in model\.merges is \['a'\]"),
    "merge of three": (model(merges=[["a", "b", "c"]]), SourceError, "two tokens"),
    "merge of numbers": (model(merges=[[1, 2]]), SourceError, "two tokens"),
    "merge of nothing": (model(merges=["a zzzz"]), SourceError, r"\('a', 'zzzz'\), expected two tokens whose"),
    "decoder": (json_(decoder={"type": "Fuse"}), UnsupportedError, "decoder"),
    "too many": (with_config(vocab_size=300), SourceError, "has id 359, expected less than .* vocab_size 300"),
    "size text": (with_config(vocab_size="9"), SourceError, "vocab_size is '9'"),
    "size huge": (with_config(vocab_size=2**40), SourceError, "vocab_size is 1099511627776"),
    "family": (with_config(model_type=None), SourceError, "model_type is None"),
    "eos text": (with_config("qwen2_moe", eos_token_id="x"), SourceError, "an id in eos_token_id is 'x'"),
    "eos negative": (with_config("qwen2_moe", eos_token_id=-2), SourceError, "an id in eos_token_id is -2"),
    "added twice": (token(id=7), SourceError, "has id 7, which is"),
    "added on another": (token(content="new", id=7), SourceError, "expected one id for each token"),
    "added without id": (token(id=None), SourceError, "an id in added_tokens is None"),
    "added without text": (token(content=None), SourceError, "content is None"),
    "added flag": (token(special="yes"), SourceError, "special is 'yes', expected true or false"),
    "added text": (json_(added_tokens="x"), SourceError, "expected an array"),
    "decoder key": (settings_(added_tokens_decoder={"x": {}}), SourceError, "'x'"),
    "decoder entry": (settings_(added_tokens_decoder={"1": 2}), SourceError, "is 2"),
    "add_bos": (settings_(add_bos_token="y"), SourceError, "add_bos_token is 'y'"),
    "extra": (settings_(extra_special_tokens=5), SourceError, "is 5"),
    "processor": (json_(post_processor=[1]), SourceError, "post_processor is"),
    "template piece": (json_(post_processor={"type": "TemplateProcessing",
                                                                              "single": [1, 2]}), SourceError, "is 1"),
    "prefix space": (edited(CASES["llama2"], "tokenizer_config.json", add_prefix_space=1), SourceError, "is 1"),
    "legacy": (with_file("added_tokens.json", b'{"a": -1}', "llama2"), SourceError, "an id in 'a' is -1"),
    "pieces empty": (damaged(b""), SourceError, "tokenizer.model: holds no pieces"),
    "pieces text": (damaged(b"version https://git-lfs"), SourceError, "tokenizer.model: holds"),
    "pieces twice": (damaged(CASES["llama2"][1]["tokenizer.model"] * 2), SourceError, "twice"),
    "pieces nan": (damaged(b"\x0a\x08\x0a\x01a\x15\x00\x00\xc0\x7f"), SourceError, "score nan"),
    "pieces kind": (damaged(b"\x0a\x05\x0a\x01a\x18\x09"), SourceError, "type 9"),
    "pieces bytes": (damaged(b"\x0a\x03\x0a\x01\xff"), SourceError, "not UTF-8"),
    "pieces long": (damaged(b"\x0a\xff\xff\xff\xff\x0f"), SourceError, "bytes at byte"),
    "pieces varint": (damaged(b"\x08" + b"\xff" * 20), SourceError, "without an end"),
    "steps": (edited(without(CASES["llama2"], "tokenizer.model"), "tokenizer.json", normalizer={"type": "NFKC"}),
              UnsupportedError, "step .*NFKC"),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_files(what: str) -> None:
    case, error, message = HOSTILE[what]
    with pytest.raises(error, match=message) as caught:
        vocabulary_keys(*case)
    assert type(caught.value) is error
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 600


BOUNDED = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


@BOUNDED
@given(data=st.data())
def test_any_value_anywhere(data: st.DataObject) -> None:
    """Whatever a file holds, it is keys or one of our errors."""
    settings, files = CASES[data.draw(st.sampled_from(["llama3", "qwen3_moe", "legacy", "decoder", "llama2-decoder"]))]
    name = data.draw(st.sampled_from(sorted(name for name in files if name.endswith(".json"))))
    value = json.loads(files[name])
    at = value
    while isinstance(at, dict | list) and len(at):
        key = data.draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(min(len(at), 20))))
        if not isinstance(at[key], dict | list) or data.draw(st.booleans()):
            at[key] = data.draw(JSON)
            break
        at = at[key]
    message = ""
    try:
        vocabulary_keys(settings, files | {name: json.dumps(value).encode()})
    except SourceError as error:
        message = error.message
    assert "\n" not in message


@BOUNDED
@given(st.integers(0, 9000), st.binary(max_size=4), st.integers(0, 3))
def test_a_damaged_tokenizer_model(at: int, patch: bytes, cut: int) -> None:
    data, message = (FIXTURES / "spm.model").read_bytes(), ""
    try:
        read_pieces(data[:at] + patch + data[at + len(patch) + cut :])
    except SourceError as error:
        message = error.message
    assert "\n" not in message


@pytest.mark.oracle
def test_the_converter_still_says_so() -> None:
    assert _oracle().ask(CASES, "any") == EXPECTED


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("name", "family"),
    [("llama-bpe", "llama"), ("llama-bpe", "smollm3"), ("qwen2", "qwen2"), ("qwen2", "qwen3"), ("refact", "granite"),
     ("gpt-2", "olmo2")],
)  # fmt: skip
def test_published_vocabularies(name: str, family: str) -> None:
    """Vocabularies that llama.cpp ships, as folders, with the names by which its converter knows them."""
    from mlxquant.files.gguf_file import GGUFFile

    metadata = GGUFFile(oracle.llama_cpp() / "models" / f"ggml-vocab-{name}.gguf").metadata
    files = tokenizer_files(metadata)
    case = config(family, vocab_size=len(metadata["tokenizer.ggml.tokens"])), files
    assert _oracle().ask({"real": case}, "known")["real"] == summary(vocabulary_keys(*case))


def _oracle() -> Any:
    """scripts/oracle_vocab.py, where llama.cpp's tools are."""
    import importlib.util

    path = Path(__file__).parent.parent.parent / "scripts" / "oracle_vocab.py"
    spec = importlib.util.spec_from_file_location("oracle_vocab", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
