"""Windows of tokens against those that llama-perplexity cuts, and the rules that its figures do not show.

tests/fixtures/windows.json holds what llama.cpp's tool wrote for small vocabularies; where MLXQUANT_LLAMA_CPP names
llama.cpp, `python -m tests.measure.test_windows` makes it anew (in llama_windows below, the command).
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlx_lm.tokenizer_utils import load

from mlxquant.errors import UsageError
from mlxquant.families.gguf_vocab import vocabulary_keys
from mlxquant.measure.corpus import Corpus, load_corpus
from mlxquant.measure.windows import Protocol, Windows, cut
from mlxquant.run.text import Text
from tests import oracle
from tests.families.gguf_page import PAGE
from tests.families.vocab_cases import _BOTH, BOS, CASES, Case, bpe
from tests.gguf_files import LlamaCpp, write_vocabulary

FIXTURE = Path(__file__).parent.parent / "fixtures" / "windows.json"
# Case -> whether llama.cpp begins texts with BOS. Names of special tokens are text like any other in both.
KINDS = {"llama3": True, "qwen2": False, "mistral": True}
TEXT = unicodedata.normalize("NFC", "<|endoftext|> at first, <s> </s> <|eos|>\n" + PAGE + "<|pad|>\n")
SMALL = Protocol(context=64, windows=8)


def corpus(text: str) -> Corpus:
    return Corpus(text, "a text", "0" * 64)


def text_of(folder: Path, case: Case, **tokenizer_config: Any) -> Text:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(case[0]))
    for name, data in case[1].items():
        (folder / name).write_bytes(data)
    if tokenizer_config:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_bytes()) | tokenizer_config))
    return Text(load(folder, {"local_files_only": True}), (), folder.name)


def gguf_of(path: Path, case: Case) -> Path:
    keys = {key: value for key, value in vocabulary_keys(*case).items() if not key.startswith("tokenizer.chat")}
    tokens = keys.pop("tokenizer.ggml.tokens")
    return write_vocabulary(path, tokens, **{key.replace(".", "__"): _plain(value) for key, value in keys.items()})


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else int(value) if isinstance(value, np.integer) else value


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Text:
    return text_of(tmp_path_factory.mktemp("plain"), CASES["qwen2"])


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory: pytest.TempPathFactory) -> Text:
    return text_of(tmp_path_factory.mktemp("bos"), CASES["llama3"])


# -- llama.cpp


def llama_windows(model: Path, text: str, protocol: Protocol) -> np.ndarray:
    """The tokens in a file of llama-perplexity: '_logits_', n_ctx, n_vocab, n_chunk, then int32 (n_chunk, n_ctx).

    Windows stand there as they were cut: only while the model runs is each one's first token BOS.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "text.txt", Path(folder) / "base.kld"
        source.write_bytes(text.encode())
        context, chunks = str(protocol.context), str(protocol.windows)
        oracle.perplexity(model, source, "-c", context, "--chunks", chunks, "--kl-divergence-base", out)
        with out.open("rb") as file:
            assert file.read(8) == b"_logits_"
            context, _, chunks = np.frombuffer(file.read(12), "<i4").tolist()
            return np.frombuffer(file.read(4 * context * chunks), "<i4").reshape(chunks, context)


def check(found: Windows, theirs_WL: np.ndarray, bos: bool) -> None:
    assert (found.bos is not None) == bos
    np.testing.assert_array_equal(found.tokens_WL[:, 1:], theirs_WL[:, 1:])
    expected = theirs_WL[0, 0] if bos else theirs_WL[:, 0]  # of the whole text, BOS is the first token
    np.testing.assert_array_equal(found.tokens_WL[:, 0], np.broadcast_to(expected, len(theirs_WL)))


@pytest.mark.parametrize("name", KINDS)
def test_windows_are_llama_perplexitys(name: str, tmp_path: Path) -> None:
    """The tokenizer as the GGUF file has it; below, the tokens of the folder's own."""
    text = Text.load(gguf_of(tmp_path / "a.gguf", CASES[name]))
    check(cut(text, corpus(TEXT), SMALL), np.array(json.loads(FIXTURE.read_bytes())[name]), KINDS[name])


@pytest.mark.oracle
@pytest.mark.parametrize("name", KINDS)
def test_the_fixture_is_what_llama_perplexity_writes(name: str, tmp_path: Path) -> None:
    theirs_WL = llama_windows(gguf_of(tmp_path / "a.gguf", CASES[name]), TEXT, SMALL)
    np.testing.assert_array_equal(theirs_WL, json.loads(FIXTURE.read_bytes())[name])


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["smol", "qwen"])
def test_windows_of_real_models_are_llama_perplexitys(name: str) -> None:
    """smol.gguf and qwen.gguf of the folder that MLXQUANT_MODELS names, on the built-in text."""
    model = Path(os.environ.get("MLXQUANT_MODELS", "")) / f"{name}.gguf"
    if not os.environ.get("MLXQUANT_MODELS") or not model.is_file():
        pytest.skip(f"MLXQUANT_MODELS names no folder with {name}.gguf")
    builtin, protocol = load_corpus("builtin"), Protocol(context=256, windows=2)
    check(cut(Text.load(model), builtin, protocol), llama_windows(model, builtin.text, protocol), False)


@pytest.mark.parametrize(("name", "bos"), [("llama3", True), ("qwen2", False), ("mistral", False)])
def test_all_tokens_of_a_folders_text_are_llamas(name: str, bos: bool, tmp_path: Path) -> None:
    """Over 100 kB, to the last one; a window of eight leaves out at most seven. bos: whether the folder's tokenizer
    begins texts with it: mistral's tokenizer.json here does not.
    """
    text = text_of(tmp_path / "folder", CASES[name])
    part = load_corpus("builtin").text[:100_000]
    tokens = cut(text, corpus(part), Protocol(context=8, windows=None)).tokens_WL
    body = {"content": part.removesuffix("\n"), "add_special": bos, "parse_special": False}
    theirs = np.array(LlamaCpp(gguf_of(tmp_path / "a.gguf", CASES[name]))._post("/tokenize", **body)["tokens"])
    count = len(theirs) // 8
    np.testing.assert_array_equal(tokens[:, 1:], theirs[: 8 * count].reshape(count, 8)[:, 1:])


# -- rules


def test_each_window_begins_with_bos_and_the_rest_is_dropped(plain: Text, with_bos: Text) -> None:
    letters = "".join("qzjx"[i % 3] for i in range(30))  # no merges: a token each
    protocol = Protocol(context=8, windows=None)
    bare, begun = cut(plain, corpus(letters), protocol), cut(with_bos, corpus(letters), protocol)
    assert bare.tokens_WL.shape == begun.tokens_WL.shape == (3, 8)
    assert (bare.bos, begun.bos) == (None, BOS)
    assert begun.tokens_WL[:, 0].tolist() == [BOS] * 3
    whole = [BOS, *bare.tokens_WL.ravel().tolist()]
    for i, window in enumerate(begun.tokens_WL):
        assert window[1:].tolist() == whole[8 * i + 1 : 8 * i + 8]
    assert bare.tokens_WL.dtype == np.int32


def test_an_end_token_is_none_of_the_texts(tmp_path: Path) -> None:
    text = text_of(tmp_path / "both", bpe("llama", post_processor=_BOTH))
    assert text.encode("qz")[-1] == 1
    found = cut(text, corpus("q" * 15), Protocol(context=16))
    assert found.tokens_WL[0, 0] == BOS
    assert set(found.tokens_WL[0, 1:].tolist()) == set(text.tokenizer.encode("q", add_special_tokens=False))


def test_names_of_special_tokens_are_text(with_bos: Text) -> None:
    found = cut(with_bos, corpus("<|endoftext|>" * 20), Protocol(context=32))
    assert found.tokens_WL[0, 0] == BOS
    assert BOS not in found.tokens_WL[0, 1:]
    assert with_bos.decode(found.tokens_WL[0, 1:14].tolist()).startswith("<|endoftext|>"[:5])
    assert with_bos.encode("a <|eos|>")[-1] == 1, "and elsewhere they are parsed as before"


@pytest.mark.parametrize("context", [8, 9, 16, 17])
@pytest.mark.parametrize("stride", [None, "least", 13, 40])
def test_no_position_is_scored_twice(plain: Text, context: int, stride: Any) -> None:
    step = context - context // 2 if stride == "least" else stride
    if step is not None and step < context - context // 2:
        pytest.skip("refused")
    letters = "".join("qzjx"[i % 4] for i in range(200))
    found = cut(plain, corpus(letters), Protocol(context, step, None))
    step = step or context
    assert found.available == len(found.tokens_WL) == (200 - context) // step + 1
    whole = cut(plain, corpus(letters), Protocol(200)).tokens_WL[0]
    scored: Counter[int] = Counter()
    for i in range(found.available):
        places = [i * step + p + 1 for p in range(found.first, context - 1)]
        assert found.next_P(i).tolist() == whole[places].tolist()
        scored.update(places)
    assert set(scored.values()) == {1}
    if stride == "least":
        assert len(scored) >= max(scored) - min(scored) + 1 - found.available  # windows meet: at most one between two


def test_windows_are_the_first_ones(plain: Text) -> None:
    everything = cut(plain, corpus(TEXT), Protocol(64, None, None))
    some = cut(plain, corpus(TEXT), Protocol(64, None, 3))
    np.testing.assert_array_equal(some.tokens_WL, everything.tokens_WL[:3])
    assert some.available == everything.available > 3
    assert everything.tokens_WL.flags.owndata


def test_digest_tells_settings_and_texts_apart(plain: Text, with_bos: Text) -> None:
    protocols = [Protocol(64, None, 4), Protocol(64, 48, 4), Protocol(64, None, 5), Protocol(128, None, 2)]
    protocols += [Protocol(64, 48, 1), Protocol(64, 49, 1)]  # one window, the same in both
    runs = [(plain, TEXT, protocol) for protocol in protocols]
    runs += [(with_bos, TEXT, protocols[0]), (plain, TEXT[1:], protocols[0])]
    digests = [cut(text, corpus(content), protocol).digest for text, content, protocol in runs]
    assert len({*digests}) == len(runs)
    same = cut(plain, corpus(TEXT), Protocol(64, 64, 4))
    assert same.digest == digests[0]
    assert len(same.digest) == 64


def test_a_short_text_is_refused_in_one_line(plain: Text) -> None:
    with pytest.raises(UsageError, match=r"a text: 15 tokens, and one window takes 16") as caught:
        cut(plain, corpus("q" * 15 + "\n"), Protocol(context=16))
    assert "\n" not in caught.value.message
    assert caught.value.hint
    assert len(cut(plain, corpus("q" * 16 + "\n"), Protocol(context=16)).tokens_WL) == 1


@pytest.mark.parametrize(
    ("values", "option"),
    [((7,), "--context 7"), ((0,), "--context 0"), ((512, 255), "--stride 255"), ((9, 4), "--stride 4"),
     ((512, 0), "--stride 0"), ((512, None, 0), "--windows 0")],
)  # fmt: skip
def test_settings_that_make_no_sense(values: tuple[Any, ...], option: str) -> None:
    with pytest.raises(UsageError, match=option):
        Protocol(*values)


def test_no_word_about_long_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = text_of(tmp_path / "short", CASES["qwen2"], model_max_length=16)
    heard: list[str] = []
    handler = logging.Handler(logging.WARNING)
    monkeypatch.setattr(handler, "emit", lambda record: heard.append(record.getMessage()))
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    try:
        cut(text, corpus(TEXT), SMALL)
        assert heard == []
        text.encode(TEXT)
        assert "longer than" in heard[0], "what users would read otherwise"
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _write_fixture() -> None:
    with tempfile.TemporaryDirectory() as folder:
        made = {
            name: llama_windows(gguf_of(Path(folder) / f"{name}.gguf", CASES[name]), TEXT, SMALL).tolist()
            for name in KINDS
        }
    lines = [f' "{name}": [\n' + ",\n".join(f"  {row}" for row in rows) + "\n ]" for name, rows in made.items()]
    FIXTURE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    _write_fixture()
