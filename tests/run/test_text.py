from __future__ import annotations

import json
import shutil
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlxquant.errors import SourceError, UnsupportedError, UsageError
from mlxquant.run.text import StopStrings, Text

SCRIPTS = "Grüße, мир! 你好 👩‍👩‍👧 ́e \n\n  two  spaces\tand tabs"


def streamed(text, ids):
    stream = text.stream()
    return "".join([*(stream.feed(i) for i in ids), stream.finish()])


def test_streamed_text_is_the_decoded_text(text):
    ids = text.encode(SCRIPTS)
    assert streamed(text, ids) == text.decode(ids) == SCRIPTS


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 511), max_size=20))
def test_any_tokens_stream_as_they_decode(text, ids):
    """Broken UTF-8 included: random tokens are bytes in any order."""
    assert streamed(text, ids) == text.decode(ids)


def test_a_character_of_several_tokens_appears_with_its_last(text):
    ids = text.encode("👧")
    assert len(ids) > 1
    stream = text.stream()
    assert [stream.feed(i) for i in ids] == [""] * (len(ids) - 1) + ["👧"]


def test_a_continuation_keeps_its_first_space(text):
    ids = text.encode(" world")
    assert streamed(text, ids) == " world"


def test_incomplete_character_at_the_end_is_marked(text):
    ids = text.encode("👧")[:-1]
    assert streamed(text, ids) == "\ufffd"


def test_template_is_rendered_and_encoded_once(text):
    rendered = text.render([{"role": "user", "content": "Hi"}])
    assert rendered == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    ids = text.encode(rendered)
    assert ids[0] == 1
    assert text.decode(ids) == rendered


def test_end_of_turn_tokens_of_the_template_end_answers(text):
    # config.json says 0; the template ends turns with <|im_end|>, token 2.
    assert text.eos_ids == (0, 2)


def changed(folder, to, **changes):
    shutil.copytree(folder, to)
    path = to / "tokenizer_config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return to


def test_beginning_token_is_not_doubled(folders, tmp_path):
    """A template that writes the beginning-of-sequence token itself, as Llama 3's does."""
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    folder = changed(folders["llama"], tmp_path / "m", chat_template=template)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    special = {"id": "<|endoftext|>", "type_id": 0}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": special}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }
    path.write_text(json.dumps(tokenizer))
    text = Text.load(folder)
    assert text.encode("a b")[0] == 0, "the tokenizer adds it to bare text"
    ids = text.encode(text.render([{"role": "user", "content": "a b"}]))
    assert ids.count(0) == 1


def test_no_template(folders, tmp_path):
    text = Text.load(changed(folders["llama"], tmp_path / "m", chat_template=None))
    assert not text.has_template
    with pytest.raises(UnsupportedError, match="no chat template"):
        text.render([{"role": "user", "content": "Hi"}])


def test_template_that_refuses(folders, tmp_path):
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role here') }}{% endif %}x"
    text = Text.load(changed(folders["llama"], tmp_path / "m", chat_template=template))
    with pytest.raises(UsageError, match="No system role here"):
        text.render([{"role": "system", "content": "Be brief"}])


def test_hostile_template_reaches_nothing(folders, tmp_path):
    template = "{{ messages.__class__.__mro__ }}"
    text = Text.load(changed(folders["llama"], tmp_path / "m", chat_template=template))
    with pytest.raises(UsageError, match="unsafe"):
        text.render([{"role": "user", "content": "Hi"}])


def test_code_of_a_tokenizer_is_not_run(folders, tmp_path):
    folder = changed(
        folders["llama"],
        tmp_path / "m",
        tokenizer_class="MyTokenizer",
        auto_map={"AutoTokenizer": [None, "evil.MyTokenizer"]},
    )
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    # Were it run, SystemExit would end the test; a tokenizer class of its own is either refused or not needed.
    with suppress(SourceError):
        Text.load(folder)


@pytest.mark.parametrize("content", ["", "{", '{"model": {"type": "Nonsense"}}'])
def test_broken_tokenizer_is_one_line(folders, tmp_path, content):
    folder = changed(folders["llama"], tmp_path / "m")
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(SourceError) as caught:
        Text.load(folder)
    assert "\n" not in caught.value.message


def fed(stops, pieces):
    guard = StopStrings(stops)
    given = [guard.feed(piece) for piece in pieces]
    return given, guard.finish(), guard.hit


def test_missing_tokenizer_is_named(folders, tmp_path):
    shutil.copytree(folders["llama"], tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").unlink()
    with pytest.raises(SourceError, match=r"m: its tokenizer cannot be read: there is no tokenizer\.json"):
        Text.load(tmp_path / "m")


def test_stop_strings_by_hand():
    assert fed(["END"], ["ab", "cE", "N", "D", "x"]) == (["ab", "c", "", "", ""], "", "END")
    assert fed(["END"], ["abE", "N", "x"]) == (["ab", "", "ENx"], "", None)
    assert fed(["END"], ["abEN"]) == (["ab"], "EN", None)
    assert fed(["aab"], ["a", "a", "a", "b"]) == (["", "", "a", ""], "", "aab")
    assert fed(["\n\n", "User:"], ["x\nUser:y\n\n"]) == (["x\n"], "", "User:")
    assert fed([], ["abc"]) == (["abc"], "", None)


@settings(deadline=None)
@given(
    st.lists(st.text("ab", min_size=1, max_size=3), max_size=3),
    st.lists(st.text("ab", max_size=3), max_size=8),
)
def test_stop_strings_give_what_comes_before_the_first(stops, pieces):
    given, held, hit = fed(stops, pieces)
    whole = "".join(pieces)
    ends = [whole.find(stop) for stop in stops if stop in whole]
    if not ends:
        assert (hit, "".join(given) + held) == (None, whole)
    else:
        assert hit in stops
        # Pieces after the first hit are not looked at, so the stop that is complete first wins.
        assert whole.startswith("".join(given) + hit)
        assert not any(stop in "".join(given) for stop in stops)


def test_empty_stop_string():
    with pytest.raises(UsageError):
        StopStrings([""])
