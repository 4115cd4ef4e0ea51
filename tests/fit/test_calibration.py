"""A machine's own speeds: kept, found again, believed over the general constants, and refused when torn."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mlxquant.errors import SourceError, TargetError
from mlxquant.families.checkpoint import checkpoint
from mlxquant.fit.cache import cache_of
from mlxquant.fit.calibration import FILE, Own, Trial, check, keep, load, own_of, state_folder
from mlxquant.fit.speed import speed, trial_of
from mlxquant.fit.subject import Subject
from mlxquant.fit.values import Level
from mlxquant.fit.work import work
from mlxquant.machine import described, probe

MAC = described("M3 Max 40-core 64GB")
TRIAL = Trial(
    "mlxquant", "one", 4e9, 1e8, 32, False, 7_500_000_000, 512, 7.7e12, 0.02, 700.0, 4e11, "2026-11-21",
    "mlx 0.32.4, mlx-lm 0.32.2", 0.016,
)  # fmt: skip


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLXQUANT_STATE", str(tmp_path / "state"))
    return tmp_path / "state"


def made(model: str, nbytes: float, layers: int, byte_s: float = 3e-12, layer_s: float = 90e-6) -> Trial:
    seconds = byte_s * nbytes + layer_s * layers
    return replace(TRIAL, model=model, weight_bytes=nbytes, cache_bytes=0.0, layers=layers, decode_s=seconds)


def test_what_is_kept_is_found_by_this_machine_alone() -> None:
    assert load(MAC) is None
    keep(MAC, [TRIAL])
    own = load(MAC)
    assert own is not None
    assert own.models == 1
    assert own.scale == pytest.approx(0.02 / 0.016)
    assert load(described("M3 Max 40-core 48GB")) is None
    assert load(described("M3 Max 30-core 36GB")) is None


def test_the_same_case_again_takes_the_place_of_the_old_one() -> None:
    keep(MAC, [TRIAL])
    keep(MAC, [replace(TRIAL, decode_s=0.016)])
    own = load(MAC)
    assert own is not None
    assert own.scale == pytest.approx(1.0)


def test_two_models_give_constants_of_its_own() -> None:
    own = own_of([made("small", 1e9, 28), made("large", 8e9, 40)])
    assert own.byte_s == pytest.approx(3e-12)
    assert own.layer_s == pytest.approx(90e-6)
    assert own.scale is None


def test_one_bad_model_of_five_does_not_bend_them() -> None:
    trials = [made(str(n), n * 1e9, 24 + 4 * n) for n in range(1, 6)]
    own = own_of([*trials[:-1], replace(trials[-1], decode_s=2 * trials[-1].decode_s)])
    assert own.byte_s == pytest.approx(3e-12, rel=0.15)


def test_two_models_of_one_size_fall_back_to_one_rate() -> None:
    own = own_of([made("a", 4e9, 32), made("b", 4.1e9, 32)])
    assert own.layer_s == 0.0
    assert own.byte_s == pytest.approx(3e-12 + 90e-6 * 32 / 4.05e9, rel=0.01)


def test_a_calibrated_mac_answers_with_its_own_speed() -> None:
    level = Level("4-bit", "mlx", (), 4 * 10**9, 4 * 10**9, 10**9, 4 * 10**9, 8 * 10**9)
    config = {
        "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    subject = Subject("llama", config, checkpoint(config))
    cost, cache = work(subject), cache_of(subject.shape)
    general = speed(level, cost, cache, MAC, (0,), 512)
    assert general is not None
    trial = trial_of(
        level, cost, cache, MAC, model="llama", depth_tokens=0, prompt_tokens=512,
        decode_tok_s=general.decode[0][1].likely / 2, prefill_tok_s=300.0, bandwidth_bytes_per_s=409.6e9,
        date="2026-11-21", versions="mlx 0.32.4",
    )  # fmt: skip
    keep(MAC, [trial])
    found = speed(level, cost, cache, MAC, (0, 4096), 512, load(MAC))
    assert found is not None
    assert found.engine == "calibrated on this machine: mlxquant mlx 0.32.4"
    assert found.decode[0][1].likely == pytest.approx(general.decode[0][1].likely / 2)
    assert found.prefill.likely == pytest.approx(300.0)
    # It timed MLX: what llama.cpp does with a GGUF file it does not know.
    gguf = replace(level, format="gguf", name="Q4_0")
    assert speed(gguf, cost, cache, MAC, (0,), 512, load(MAC)) == speed(gguf, cost, cache, MAC, (0,), 512)


def test_a_tiny_model_timed_here_is_met_by_what_it_calibrates(tmp_path: Path) -> None:
    """A machine without published bandwidth: bench, keep, ask again."""
    from mlx.utils import tree_flatten

    from mlxquant.measure.speed import Case, bench
    from mlxquant.run.model import load_model
    from tests.tiny import VOCAB, make

    folder = make(tmp_path / "tiny", width=256, layers=4)
    model = load_model(folder).model
    config = json.loads((folder / "config.json").read_text())
    nbytes = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    subject = Subject("tiny", config, checkpoint(config))
    cost, cache = work(subject), cache_of(subject.shape)
    level = Level("bf16", "mlx", (), nbytes, nbytes, nbytes, nbytes, nbytes // 2)
    machine = replace(probe(), bandwidth_bytes_per_s=None)
    assert speed(level, cost, cache, machine, (0,), 64) is None

    from mlx_lm.models.cache import make_prompt_cache

    (row,) = bench(model, lambda: make_prompt_cache(model), VOCAB, [Case(64, 32, 0)], 2)
    trial = trial_of(
        level, cost, cache, machine, model="tiny", depth_tokens=80, prompt_tokens=64,
        decode_tok_s=row.mean("decode_tok_s"), prefill_tok_s=row.mean("prefill_tok_s"), bandwidth_bytes_per_s=1e10,
        date="2026-11-21", versions="mlx",
    )  # fmt: skip
    keep(machine, [trial])
    found = speed(level, cost, cache, machine, (80,), 64, load(machine))
    assert found is not None
    assert found.decode[0][1].likely == pytest.approx(row.mean("decode_tok_s"))
    assert found.prefill.likely == pytest.approx(row.mean("prefill_tok_s"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"version": 2, "machines": {}}',
        '{"version": 1, "machines": []}',
        '{"version": 1, "machines": {"a": 3}}',
        '{"version": 1, "machines": {"a": [{"model": "x"}]}}',
        "\udcff",
        "[" * 100_000,
    ],
)
def test_a_torn_or_foreign_file_is_one_clear_line(home: Path, text: str) -> None:
    home.mkdir()
    (home / FILE).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(SourceError, match=FILE) as caught:
        load(MAC)
    assert "\n" not in caught.value.message
    assert caught.value.hint
    with pytest.raises(SourceError):
        keep(MAC, [TRIAL])
    assert (home / FILE).read_bytes() == text.encode("utf-8", "surrogateescape")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("decode_s", 0),
        ("decode_s", float("nan")),
        ("layers", "8"),
        ("moe", 1),
        ("weight_bytes", -1),
        ("layers", 10**400),
        ("decode_s", 1e-320),
        ("prompt_flops", 1e308),
        ("engine", "\x1b[31m"),
    ],
)
def test_a_measurement_that_cannot_be_is_named(home: Path, name: str, value: object) -> None:
    keep(MAC, [TRIAL])
    found = json.loads((home / FILE).read_text())
    next(iter(found["machines"].values()))[0][name] = value
    (home / FILE).write_text(json.dumps(found))
    with pytest.raises(SourceError, match=name):
        load(MAC)


def test_two_processes_keep_what_both_measured(home: Path) -> None:
    script = "import sys; from tests.fit.test_calibration import keep_many; keep_many(sys.argv[1])"
    running = [subprocess.Popen([sys.executable, "-c", script, name]) for name in "abc"]
    assert [process.wait(timeout=60) for process in running] == [0, 0, 0]
    found = json.loads((home / FILE).read_text())
    assert len(next(iter(found["machines"].values()))) == 3 * MANY


MANY = 25


def keep_many(name: str) -> None:
    for number in range(MANY):
        keep(MAC, [made(f"{name} {number}", 4e9, 32)])


def test_what_cannot_be_kept_is_said_before_anything_is_timed(home: Path) -> None:
    check(MAC)
    assert not home.exists()
    home.write_text("")
    with pytest.raises((TargetError, SourceError), match=FILE):
        check(MAC)


def test_nothing_is_left_beside_it(home: Path) -> None:
    assert keep(MAC, [TRIAL]) == home / FILE
    assert list(home.iterdir()) == [home / FILE]


def test_a_state_folder_that_is_a_file_is_an_error_of_the_target(home: Path) -> None:
    home.write_text("")
    with pytest.raises((TargetError, SourceError), match=FILE):
        keep(MAC, [TRIAL])


def test_where_it_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MLXQUANT_STATE")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr("platform.system", lambda: "Linux")
    assert state_folder() == tmp_path / "mlxquant"
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    assert state_folder().parts[-3:] == ("Library", "Application Support", "mlxquant")


def test_own_answers_alone() -> None:
    own = Own("mlx", 1, None, 2e-12, 0.0, 1e12, 0.2, 0.2)
    assert own.alone
    assert own.decode_s(1e9, 10) == pytest.approx(2e-3)
