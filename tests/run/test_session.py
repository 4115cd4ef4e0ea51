from __future__ import annotations

import json

import mlx.core as mx
import pytest

from mlxquant.errors import MemoryBudgetError, SourceError, TargetError, UsageError
from mlxquant.run.cache import plan_cache
from mlxquant.run.generate import generate
from mlxquant.run.model import load_model
from mlxquant.run.sampling import Sampling
from mlxquant.run.session import Session, common_prefix
from tests.run.fakes import Counting


@pytest.fixture(scope="module")
def model(folders):
    return load_model(folders["llama"]).model


def session(model, text, plan=None, **options):
    options.setdefault("max_tokens", 6)
    return Session(Counting(model), text, plan or plan_cache(model), **options)


def say(talk, question):
    return "".join(talk.ask(question))


def from_scratch(model, text, talk, plan=None):
    """The same last question, with an empty cache: the exact tokens the session would answer with."""
    turn = talk.turns[-1]
    prompt = talk._fed[: turn.reused_tokens + turn.stats.prompt_tokens]
    run = generate(model, prompt, (plan or plan_cache(model)).make(), max_tokens=6, eos_ids=text.eos_ids)
    return prompt, [token.id for token in run]


def test_ten_turns_cost_prefill_only_for_what_is_new(model, text):
    talk = session(model, text, system="Be brief.")
    fed, new = [], []
    for turn in range(10):
        before = talk._model.tokens
        say(talk, f"Question number {turn}, please?")
        fed.append(talk._model.tokens - before)
        # What the user added: the end of the last answer's turn, the question, and the opening of the next
        # answer.
        asked = f"<|im_start|>user\nQuestion number {turn}, please?<|im_end|>\n"
        added = f"<|im_end|>\n{asked}<|im_start|>assistant\n"
        new.append(len(text.encode(added)))
    answered = [turn.stats.generated_tokens for turn in talk.turns]
    assert all(turn.recomputed is None for turn in talk.turns)
    for turn in range(1, 10):
        # + 1: the last token of an answer cut by its length has not been fed when the answer ends.
        assert fed[turn] <= new[turn] + answered[turn] + 1
    assert sum(fed) < 0.3 * sum(range(1, 11)) * (min(new) + min(answered)) + new[0], "far from quadratic"


def test_reused_cache_answers_as_a_fresh_one(model, text):
    talk = session(model, text)
    for question in ("What is a class?", "And a module?", "Why so?"):
        say(talk, question)
        prompt, wanted = from_scratch(model, text, talk)
        assert talk._answered[1] == prompt + wanted
    assert talk.turns[-1].reused_tokens > 0


def test_conversation_is_what_the_template_says(model, text):
    talk = session(model, text, system="Be brief.")
    for question in ("One", "Two", "Three"):
        say(talk, question)
    rendered = text.render([{"role": "system", "content": "Be brief."}, *talk.messages[:-1]])
    prompt, _ = from_scratch(model, text, talk)
    assert text.decode(prompt) == rendered


def test_stopped_answer_stays_and_the_chat_goes_on(model, text):
    talk = session(model, text, max_tokens=50)
    pieces = talk.ask("Tell me a story")
    first = next(pieces)
    pieces.close()
    assert talk.turns[-1].finish == "stopped"
    assert [m["role"] for m in talk.messages] == ["user", "assistant"]
    assert talk.messages[-1]["content"] == first
    say(talk, "Go on")
    assert talk.turns[-1].reused_tokens > 0
    prompt, _ = from_scratch(model, text, talk)
    assert text.decode(prompt) == text.render(talk.messages[:-1])


def test_stop_flag_ends_the_answer(model, text):
    talk = session(model, text, max_tokens=50)
    asked = iter([False] * 3 + [True] * 50)
    "".join(talk.ask("Tell me", stop=lambda: next(asked)))
    assert talk.turns[-1].finish == "stopped"
    assert talk.turns[-1].stats.generated_tokens < 5


def test_question_stopped_before_its_answer_is_forgotten(model, text):
    talk = session(model, text)
    say(talk, "Hello")
    messages = list(talk.messages)
    assert "".join(talk.ask("A question", stop=lambda: True)) == ""
    assert talk.turns[-1].dropped
    assert talk.messages == messages
    say(talk, "Another")
    prompt, wanted = from_scratch(model, text, talk)
    assert text.decode(prompt) == text.render(talk.messages[:-1])
    assert talk._answered[1] == prompt + wanted


def test_stop_string_is_not_said(model, text):
    free = say(session(model, text, max_tokens=12), "Tell me")
    middle = free[len(free) // 2 : len(free) // 2 + 2]
    talk = session(model, text, max_tokens=12, stops=(middle,))
    assert say(talk, "Tell me") == free[: free.index(middle)]
    assert talk.turns[-1].finish == "stop string"
    say(talk, "And then?")
    prompt, _ = from_scratch(model, text, talk)
    assert text.decode(prompt) == text.render(talk.messages[:-1])


def test_broken_step_empties_the_cache(model, text):
    talk = session(model, text)
    say(talk, "Hello")
    real, talk._model = talk._model, lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        say(talk, "Again")
    assert talk.cached_tokens == 0
    talk._model = real
    say(talk, "And now")
    prompt, wanted = from_scratch(model, text, talk)
    assert talk._answered[1] == prompt + wanted


def test_cache_that_cannot_be_cut_is_made_again_and_says_so(model, text):
    plan = plan_cache(model, max_kv_size=16)
    talk = session(model, text, plan)
    say(talk, "A question that is longer than sixteen tokens, to be sure of it?")
    say(talk, "More?")
    # The answer was cut by its length, so the cache is a prefix of the next prompt and nothing has to leave
    # it.
    assert talk.turns[-1].recomputed is None
    talk.set_system("Another beginning")
    say(talk, "And now?")
    assert "computed again" in talk.turns[-1].recomputed or talk.turns[-1].reused_tokens == 0
    talk.messages[1]["content"] = "Something else was said."
    say(talk, "Well?")
    assert "cannot be cut" in talk.turns[-1].recomputed


def test_reset_and_system(model, text):
    talk = session(model, text)
    first = say(talk, "Hello")
    say(talk, "More")
    talk.reset()
    assert (talk.messages, talk.turns, talk.cached_tokens) == ([], [], 0)
    assert say(talk, "Hello") == first
    talk.set_system("Be brief.")
    say(talk, "Hello")
    prompt, _ = from_scratch(model, text, talk)
    assert text.decode(prompt).startswith("<|im_start|>system\nBe brief.")


def test_context_ends_answers_and_refuses_questions(model, text):
    talk = session(model, text, max_tokens=None, context_tokens=30)
    say(talk, "Hello")
    assert talk.turns[-1].finish == "full context"
    assert talk.turns[-1].stats.prompt_tokens + talk.turns[-1].stats.generated_tokens <= 30
    messages = list(talk.messages)
    with pytest.raises(MemoryBudgetError, match="the context 30"):
        say(talk, "A long question " * 20)
    assert talk.messages == messages


def test_save_and_load_go_on_where_it_was(model, text, tmp_path):
    talk = session(model, text, system="Be brief.")
    say(talk, "Grüße, 你好")
    talk.save(tmp_path / "chat.json")
    other = session(model, text)
    assert other.load(tmp_path / "chat.json") == "llama"
    assert (other.messages, other.system) == (talk.messages, "Be brief.")
    say(other, "And now?")
    prompt, _ = from_scratch(model, text, other)
    assert text.decode(prompt) == text.render([{"role": "system", "content": "Be brief."}, *other.messages[:-1]])


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"format": "mlxquant-chat-1"}', '{"format": "mlxquant-chat-1", "messages": [1]}',
     '{"format": "mlxquant-chat-1", "messages": [{"role": "assistant", "content": "x"}]}',
     '{"format": "mlxquant-chat-1", "messages": [{"role": "user", "content": 3}]}',
     '{"format": "mlxquant-chat-1", "messages": [{"role": "user", "content": "not answered"}]}',
     '{"format": "mlxquant-chat-1", "system": 3, "messages": []}', "[" * 100000],
)  # fmt: skip
def test_files_that_are_no_chat(model, text, tmp_path, content):
    talk = session(model, text)
    talk.messages.append({"role": "user", "content": "kept"})
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(SourceError, match=r"x\.json"):
        talk.load(tmp_path / "x.json")
    assert len(talk.messages) == 1


def test_a_chat_without_a_system_prompt_may_leave_it_out(model, text, tmp_path):
    (tmp_path / "x.json").write_text('{"format": "mlxquant-chat-1", "messages": []}')
    talk = session(model, text, system="Be brief.")
    talk.load(tmp_path / "x.json")
    assert talk.system is None


def test_saving_where_one_cannot(model, text, tmp_path):
    with pytest.raises(TargetError):
        session(model, text).save(tmp_path / "no" / "such" / "folder.json")


def test_what_is_no_text_is_refused_and_can_be_saved(model, text, tmp_path):
    talk = session(model, text)
    talk.set_system("caf\udce9")
    with pytest.raises(UsageError, match="no UTF-8 after 'caf'"):
        say(talk, "Hello")
    assert talk.messages == []
    talk.save(tmp_path / "chat.json")
    other = session(model, text)
    other.load(tmp_path / "chat.json")
    assert other.system == "caf\udce9"


def test_saved_file_holds_no_path(model, text, tmp_path):
    session(model, text).save(tmp_path / "chat.json")
    assert "/" not in json.loads((tmp_path / "chat.json").read_text())["model"]


def test_repetition_penalty_sees_the_whole_conversation(model, text):
    """With reuse the loop is given the new tokens only, yet the penalty must count the old ones."""
    options = {"sampling": Sampling(repetition_penalty=1.5, repetition_context=200)}
    talk = session(model, text, **options)
    say(talk, "Hello there")
    say(talk, "Hello there")
    prompt, _ = from_scratch(model, text, talk)
    run = generate(model, prompt, plan_cache(model).make(), options["sampling"], max_tokens=6, eos_ids=text.eos_ids)
    assert talk._answered[1][len(prompt) :] == [token.id for token in run]


def test_quantized_cache_works_in_a_session(model, text):
    plan = plan_cache(model, kv_bits=8, kv_group_size=32)
    talk = session(model, text, plan)
    say(talk, "Hello")
    say(talk, "More")
    assert talk.turns[-1].reused_tokens > 0
    assert talk.cache_bytes == sum(entry.nbytes for entry in talk._cache) > 0


def test_common_prefix():
    assert common_prefix([], [1]) == 0
    assert common_prefix([1, 2, 3], [1, 2]) == 2
    assert common_prefix([1, 2, 3], [1, 9, 3]) == 1
    assert mx.default_device().type == mx.cpu
