from __future__ import annotations

import time

import mlx.core as mx
import pytest

from mlxquant.errors import SourceError, UsageError
from mlxquant.run.cache import plan_cache
from mlxquant.run.generate import generate
from mlxquant.run.model import load_model
from tests.run.fakes import Successor, held


def ids(run):
    return [token.id for token in run]


def test_counts_up_to_the_limit_and_feeds_all_but_the_last_token():
    model = Successor()
    cache = model.make_cache()
    run = generate(model, [3, 4, 5], cache, max_tokens=4)
    assert ids(run) == [6, 7, 8, 9]
    assert run.finish == "length"
    assert run.fed == held(cache) == [3, 4, 5, 6, 7, 8]
    assert model.calls == [2, 1, 1, 1, 1]
    assert (run.stats.prompt_tokens, run.stats.generated_tokens) == (3, 4)


def test_prompt_is_fed_in_chunks_and_progress_is_told():
    model, seen = Successor(), []
    run = generate(
        model, list(range(10)), model.make_cache(), max_tokens=1, prefill_step=4,
        on_progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert ids(run) == [10]
    assert model.calls == [4, 4, 1, 1]
    assert seen == [(0, 10), (4, 10), (8, 10), (10, 10)]


def test_eos_ends_the_run_and_is_counted_but_not_yielded():
    model = Successor()
    cache = model.make_cache()
    run = generate(model, [3], cache, eos_ids=(7, 20), max_tokens=100)
    assert ids(run) == [4, 5, 6]
    assert run.finish == "eos"
    assert run.stats.generated_tokens == 4
    assert run.fed == held(cache) == [3, 4, 5, 6, 7]


def test_eos_on_the_last_allowed_token_is_eos():
    model = Successor()
    run = generate(model, [3], model.make_cache(), eos_ids=(5,), max_tokens=2)
    assert ids(run) == [4]
    assert run.finish == "eos"


def test_without_a_limit_it_runs_until_eos():
    run = generate(Successor(), [3], Successor().make_cache(), eos_ids=(2,))
    assert ids(run)[-1] == 1


@pytest.mark.parametrize("after", [1, 2, 5])
def test_closing_leaves_the_cache_as_fed_says(after):
    model = Successor()
    cache = model.make_cache()
    run = generate(model, [3, 4], cache, max_tokens=100)
    for _ in range(after):
        next(run)
    run.close()
    assert run.finish == "stopped"
    assert run.intact
    assert run.fed == held(cache) == [3, *range(4, 5 + after)]


def test_stop_between_chunks_yields_nothing_and_keeps_what_was_fed():
    model, asked = Successor(), iter([False, True])
    cache = model.make_cache()
    run = generate(model, list(range(10)), cache, max_tokens=5, prefill_step=4, stop=lambda: next(asked))
    assert ids(run) == []
    assert run.finish == "stopped"
    assert run.fed == held(cache) == [0, 1, 2, 3]


def test_stop_between_tokens():
    model, asked = Successor(), iter([False, False, True])
    run = generate(model, [0], model.make_cache(), max_tokens=100, stop=lambda: next(asked))
    assert ids(run) == [1, 2, 3]
    assert run.finish == "stopped"


def test_an_exception_inside_a_step_is_told():
    class Breaking(Successor):
        def __call__(self, tokens_BL, cache):
            if len(self.calls) == 4:
                raise KeyboardInterrupt
            return super().__call__(tokens_BL, cache)

    model = Breaking()
    run = generate(model, [0, 1], model.make_cache(), max_tokens=100)
    with pytest.raises(KeyboardInterrupt):
        ids(run)
    assert not run.intact


def test_next_step_is_dispatched_before_the_last_token_is_given_out():
    model = Successor()
    run = generate(model, [0], model.make_cache(), max_tokens=3)
    next(run)
    assert len(model.calls) == 2


def test_a_step_counts_once_in_prefill_or_in_decode():
    """Dispatching takes as long as the step on a CPU; sleeping while the graph is built stands for that."""

    def model(tokens_BL, cache):
        time.sleep(0.1)
        return Successor()(tokens_BL, cache)

    run = generate(model, [1, 2], Successor().make_cache(), max_tokens=4)
    list(run)
    assert 0.2 <= run.stats.prefill_s < 0.3, "one call for all but the last of the prompt, one for that"
    assert 0.3 <= run.stats.decode_s < 0.4, "three tokens after the first"


def test_logprob_is_the_log_softmax():
    (token,) = generate(Successor(vocab=8), [3], Successor().make_cache(), max_tokens=1)
    logits = mx.array([0.0] * 7 + [5.0])
    assert token.logprob == pytest.approx(float(5 - mx.logsumexp(logits).item()), abs=1e-6)


@pytest.mark.parametrize("wrong", [{"max_tokens": 0}, {"prefill_step": 0}])
def test_numbers_that_mean_nothing(wrong):
    with pytest.raises(UsageError):
        generate(Successor(), [1], Successor().make_cache(), **wrong)
    with pytest.raises(UsageError, match="no tokens"):
        generate(Successor(), [], Successor().make_cache())


def stock(folder, tokens, count, **options):
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model as load

    model, _ = load(folder)
    return [token for token, _ in generate_step(mx.array(tokens), model, max_tokens=count, **options)]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_greedy_tokens_are_stock_mlx_lms(folders, family):
    prompt = [5, 17, 300, 42, 9, 100, 222]
    model = load_model(folders[family], expand="off").model
    run = generate(model, prompt, plan_cache(model).make(), max_tokens=64)
    assert ids(run) == stock(folders[family], prompt, 64)


def test_greedy_tokens_are_stock_mlx_lms_from_a_quantized_folder(quantized):
    prompt = list(range(3, 60))
    loaded = load_model(quantized, expand="off")
    assert not loaded.expanded
    run = generate(loaded.model, prompt, plan_cache(loaded.model).make(), max_tokens=64, prefill_step=16)
    assert ids(run) == stock(quantized, prompt, 64, prefill_step_size=16)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_cache_says_what_stock_mlx_lm_says_with_the_same_cache(folders, bits):
    from mlx_lm.models.cache import QuantizedKVCache

    prompt = list(range(3, 60))
    model = load_model(folders["llama"], expand="off").model
    plan = plan_cache(model, kv_bits=bits, kv_group_size=32)
    theirs = [QuantizedKVCache(group_size=32, bits=bits) for _ in range(2)]
    assert ids(generate(model, prompt, plan.make(), max_tokens=24)) == stock(
        folders["llama"], prompt, 24, prompt_cache=theirs
    )


def test_sampled_tokens_repeat_with_the_seed(folders):
    from mlxquant.run.sampling import Sampling

    model = load_model(folders["llama"]).model

    def draw(seed):
        settings = Sampling(temperature=1.0, top_p=0.9, seed=seed, repetition_penalty=1.1)
        return ids(generate(model, [5, 6, 7], plan_cache(model).make(), settings, max_tokens=16))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_logits_that_are_nan_end_the_run():
    """argmax takes token 0 from them, again and again."""
    model = Successor()
    run = generate(lambda tokens, cache: model(tokens, cache) * float("nan"), [3], model.make_cache(), max_tokens=4)
    with pytest.raises(SourceError, match="logits are NaN"):
        next(run)
