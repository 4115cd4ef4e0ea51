"""The bench counts what it should: prompt, depth, generated tokens, and the first token as prefill."""

from __future__ import annotations

import json
from types import SimpleNamespace

import mlx.core as mx
import pytest

from mlxquant.cli.bench import cells
from mlxquant.measure.speed import Case, Row, Trial, bench, cases, run_case, token_ids
from mlxquant.measure.traffic import active_share, bytes_per_token
from mlxquant.run.model import load_model
from tests.cli.runner import mlxquant
from tests.tiny import make

VOCAB = 32


class Counting:
    """A model with known logits that notes how many tokens each call brings."""

    def __init__(self):
        self.calls = []

    def __call__(self, tokens, cache=None):
        self.calls.append(tokens.shape[1])
        for entry in cache or []:
            entry.seen += tokens.shape[1]
        return mx.zeros((1, tokens.shape[1], VOCAB))


class Cache:
    def __init__(self):
        self.seen = 0

    @property
    def state(self):
        return mx.array(self.seen)


def test_a_case_feeds_depth_then_prompt_then_its_own_tokens():
    model, cache = Counting(), [Cache()]
    trial = run_case(model, cache, VOCAB, Case(prompt_tokens=10, generated_tokens=5, depth_tokens=7), prefill_step=4)
    # depth 7 in chunks of 4; then 9 of the 10 prompt tokens in chunks; the last one and 4 generated ones singly
    assert model.calls == [4, 3, 4, 4, 1, 1, 1, 1, 1, 1]
    assert cache[0].seen == 7 + 10 + 4
    assert trial.ttft_s > 0
    assert trial.prefill_tok_s == pytest.approx(10 / trial.ttft_s)


def test_the_first_token_belongs_to_prefill(monkeypatch):
    """On a clock that only the model moves: 10 s for each call that brings prompt tokens, 1 s for each of its own."""
    now = [0.0]

    class Slow(Counting):
        def __call__(self, tokens, cache=None):
            now[0] += 10.0 if len(self.calls) < 3 else 1.0
            return super().__call__(tokens, cache)

    monkeypatch.setattr("mlxquant.run.generate.time", SimpleNamespace(perf_counter=lambda: now[0]))
    trial = run_case(Slow(), [Cache()], VOCAB, Case(5, 6, 0), prefill_step=2)
    # Chunks of 2 and 2, then the last prompt token; the second token's step may be sent off before the first is read.
    assert trial.ttft_s in (30, 31)
    assert trial.prefill_tok_s == pytest.approx(5 / trial.ttft_s)
    assert trial.decode_tok_s == pytest.approx(5 / (now[0] - trial.ttft_s))


def test_the_peak_is_each_trials_own():
    mx.eval(mx.zeros(10_000_000))
    assert mx.get_peak_memory() >= 40_000_000
    trial = run_case(Counting(), [Cache()], VOCAB, Case(2, 2, 0), prefill_step=4)
    assert trial.peak_bytes < mx.get_active_memory() + 20_000_000


def test_each_repetition_has_a_fresh_cache_and_other_tokens():
    made = []

    def fresh():
        made.append([Cache()])
        return made[-1]

    rows = list(bench(Counting(), fresh, VOCAB, [Case(4, 2, 0), Case(8, 2, 3)], repeats=3))
    assert [len(row.trials) for row in rows] == [3, 3]
    assert len(made) == 1 + 6  # one to warm up
    assert token_ids(8, VOCAB, seed=0) != token_ids(8, VOCAB, seed=1)
    assert token_ids(8, VOCAB, seed=1) == token_ids(8, VOCAB, seed=1)


def test_mean_and_deviation():
    row = Row(Case(1, 2, 0), tuple(Trial(1.0, p, 10.0, peak) for p, peak in ((2.0, 5), (4.0, 9))))
    assert row.mean("prefill_tok_s") == 3.0
    assert row.deviation("prefill_tok_s") == pytest.approx(2**0.5)
    assert row.peak_bytes == 9
    assert row.to_json()["repeats"] == 2


def test_fast_rates_have_no_exponent():
    row = Row(Case(1024, 2, 0), tuple(Trial(0.1, p, 10.0, 5) for p in (12300.0, 12500.0)))
    assert cells("mlxquant", row) == ["mlxquant", "0", "1,024", "2", "0.10 s", "12,400 ± 141", "10 ± 0", "5 B"]


def test_cases_are_the_product():
    assert [(c.depth_tokens, c.prompt_tokens, c.generated_tokens) for c in cases([1, 2], [3], [0, 9])] == [
        (0, 1, 3), (0, 2, 3), (9, 1, 3), (9, 2, 3),
    ]  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
def test_bytes_per_token_leave_out_an_untied_embedding(tmp_path, tied):
    folder = make(tmp_path / "m", tied=tied)
    loaded = load_model(folder, expand="off")
    embedding = 512 * 128 * 2
    expected = loaded.weight_bytes - (0 if tied else embedding)
    assert bytes_per_token(loaded.model, loaded.config) == expected


def test_bytes_per_token_count_active_experts_only(tmp_path):
    loaded = load_model(make(tmp_path / "m", "mixtral"), expand="off")
    assert bytes_per_token(loaded.model, loaded.config) < 0.9 * loaded.weight_bytes
    assert active_share({"num_local_experts": 8, "num_experts_per_tok": 2}) == 0.25
    assert active_share({"hidden_size": 8}) == 1.0


def test_bench_against_stock_prints_ratios_and_one_json_line(tmp_path):
    source, out = make(tmp_path / "m"), tmp_path / "out"
    assert mlxquant("convert", source, "-o", out).code == 0
    result = mlxquant("bench", out, "-p", "8,16", "-n", "4", "-d", "0,8", "-r", "2", "--against", "mlx-lm")
    assert result.code == 0, result.err
    value = json.loads(result.out.splitlines()[-1])
    assert len(value["rows"]) == len(value["mlx_lm_rows"]) == len(value["ratios"]) == 4
    assert value["rows"][1]["prompt_tokens"] == 16
    assert "ratio" in result.out
    for ours, stock, ratio in zip(value["rows"], value["mlx_lm_rows"], value["ratios"], strict=True):
        assert ratio["decode_tok_s"] == pytest.approx(ours["decode_tok_s"] / stock["decode_tok_s"])


def test_bench_refuses_what_it_cannot_do(tmp_path):
    source = make(tmp_path / "m")
    assert mlxquant("bench", source, "-p", "0").code == 2
    assert mlxquant("bench", source, "-p", "many").code == 2
