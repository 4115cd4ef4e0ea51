"""Formats within a limit of bytes: never over, no step left, near the least that there is; and the file of costs."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest

from mlxquant.codecs.spec import KEEP, affine
from mlxquant.convert.sources import open_source
from mlxquant.errors import PlanError, SourceError
from mlxquant.families.roles import SENSITIVE, Role
from mlxquant.plan.budget import FORMATS, budget, explain, formats, limit_of
from mlxquant.plan.plan import choose, lay_out
from mlxquant.plan.recipe import settings
from mlxquant.plan.sensitivities import Cost, Sensitivities, from_json
from mlxquant.plan.solver import Option, Unit, least_nats, solve
from tests.tiny import make

FAMILIES = ("llama", "qwen2", "gemma3", "qwen2_moe", "deepseek_v3", "qwen3_next")


def random_costs(plan, rng):
    """Twice the error for a bit less, slopes over four orders of magnitude, and a tenth of noise."""
    costs = {}
    for name, codecs in formats(plan).items():
        slope = 10 ** rng.uniform(-5, -1)
        errors = {c: 4.0**-c.bits * (1 + c.group_size / 128) * rng.uniform(0.9, 1.1) for c in codecs}
        costs[name] = {c: Cost(slope * error, error) for c, error in errors.items()}
    return costs


def random_units(rng, count, options):
    return [
        Unit(
            str(i),
            tuple(
                Option(affine(4, 64), int(nbytes), nats)
                for nbytes, nats in zip(rng.integers(1, 60, options), rng.exponential(size=options), strict=True)
            ),
        )
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Layouts of a few families; some widths that not every group divides."""
    made = []
    for family in FAMILIES:
        source = open_source(
            make(tmp_path_factory.mktemp(family) / "m", family, width=192 if family == "llama" else 128)
        )
        made.append(lay_out(source.config, source.specs))
    return made


def steps_left(choice, plan, costs):
    """Bytes of every better option of a single tensor, beyond what it has."""
    for tensor in plan.tensors:
        now = choice.chosen[tensor.name]
        floor = 8 if tensor.role in SENSITIVE and not choice.remarks else 0
        for codec in formats(plan).get(tensor.name, ()):
            nbytes = replace(tensor, codec=codec).nbytes
            if codec.bits >= floor and costs[tensor.name][codec].nats < now.nats:
                yield nbytes - now.nbytes


def test_random_budgets_are_never_over_and_leave_no_step(bases):
    rng = np.random.default_rng(0)
    for trial in range(100):
        basis = bases[trial % len(bases)]
        plan = choose(basis, settings(group_size=32))
        costs = random_costs(plan, rng)
        least = min_bytes(plan, costs)
        limit = int(least + rng.uniform(0, 1.1) * (limit_of(plan, 8.6) - least))
        choice = budget(plan, costs, limit)
        made = choose(basis, choice.settings(plan.settings))
        assert made.nbytes == choice.nbytes <= limit
        assert {t.name: t.codec for t in made.tensors} == {name: o.codec for name, o in choice.chosen.items()}
        assert made.base == choice.commonest
        assert limit - choice.nbytes < min(steps_left(choice, plan, costs), default=float("inf"))


def min_bytes(plan, costs):
    with pytest.raises(PlanError, match="cannot be met: the smallest") as error:
        budget(plan, costs, 1000)
    return int(error.value.message.rpartition("(")[2].partition(" ")[0].replace(",", ""))


def test_the_smallest_that_is_named_can_be_had_and_one_byte_less_cannot(bases):
    plan = choose(bases[0], settings(group_size=32))
    costs = random_costs(plan, np.random.default_rng(1))
    least = min_bytes(plan, costs)
    assert budget(plan, costs, least).nbytes == least
    with pytest.raises(PlanError):
        budget(plan, costs, least - 1)


@pytest.mark.parametrize("seed", range(30))
def test_near_the_best_of_all_choices(seed):
    """Brute force over 5 units of 5 options; where none is left out, and never below the linear relaxation."""
    rng = np.random.default_rng(seed)
    units = random_units(rng, 5, 5)
    limit = int(rng.integers(60, 240))
    if limit < sum(min(o.nbytes for o in unit.options) for unit in units):
        return
    found = sum(option.nats for option in solve(units, limit).values())
    every = itertools.product(*[unit.options for unit in units])
    best = min(sum(o.nats for o in pick) for pick in every if sum(o.nbytes for o in pick) <= limit)
    assert least_nats(units, limit) <= best + 1e-12
    assert best - 1e-12 <= found <= 1.2 * best


def test_as_good_as_the_relaxation_for_many_units():
    units = random_units(np.random.default_rng(3), 200, 12)
    for limit in (1500, 2500, 4000):
        found = solve(units, limit)
        assert sum(o.nbytes for o in found.values()) <= limit
        assert sum(o.nats for o in found.values()) <= 1.01 * least_nats(units, limit)


def test_routers_keep_eight_bits_while_that_can_be(bases):
    plan = choose(bases[FAMILIES.index("qwen2_moe")], settings(group_size=32))
    costs = random_costs(plan, np.random.default_rng(2))
    routers = [t.name for t in plan.tensors if t.role in {Role.ROUTER, Role.SHARED_GATE} and t.name in formats(plan)]
    easy, hard = budget(plan, costs, limit_of(plan, 3.5)), budget(plan, costs, min_bytes(plan, costs))
    assert routers
    assert {easy.chosen[name].codec.bits for name in routers} == {8}
    assert not easy.remarks
    assert {hard.chosen[name].codec.bits for name in routers} == {2}
    assert "less than 8 bits" in hard.remarks[0]


def test_sets_stay_and_what_mlx_keeps_float_is_counted(bases):
    wanted = settings(group_size=32, sets=("layers.0.mlp=8g32",))
    plan = choose(bases[0], wanted)
    choice = budget(plan, random_costs(plan, np.random.default_rng(4)), limit_of(plan, 5.5))
    assert {o.codec.label for name, o in choice.chosen.items() if "layers.0.mlp" in name} == {"8g32"}
    assert not any("layers.0.mlp" in name for name in choice.free)
    kept = [t for t in plan.tensors if t.codec == KEEP]
    assert kept
    assert all(choice.chosen[t.name].nbytes == t.nbytes for t in kept)
    assert choice.bpw <= 5.5


def test_limits_are_exact(bases):
    plan = choose(bases[0], settings())
    for bpw in (4.25, 3.1, plan.bpw):
        limit = limit_of(plan, bpw)
        assert limit * 8 / plan.size <= bpw < (limit + 1) * 8 / plan.size


def test_it_explains_who_has_more_and_why(bases):
    plan = choose(bases[0], settings(group_size=32))
    costs = {
        name: {c: Cost(1e-3 * 4.0**-c.bits * (1 + c.group_size / 256), 4.0**-c.bits) for c in codecs}
        for name, codecs in formats(plan).items()
    }
    name = "model.layers.1.mlp.down_proj.weight"
    costs[name] = {c: Cost(50 * cost.nats, cost.error) for c, cost in costs[name].items()}
    choice = budget(plan, costs, limit_of(plan, 4.5))
    first = explain(choice, measured(costs))[0]
    assert first.name == name
    assert first.more_bits > 1
    assert first.error == pytest.approx(1)
    assert first.slope == pytest.approx(first.ratio, rel=0.3)
    assert str(first).startswith(f"{name}: {first.codec.label} (+")


def measured(costs, **changes):
    sizes = dict.fromkeys(costs, 1000)
    return replace(Sensitivities("a1", "gptq", "builtin", "b2", sizes, costs), **changes)


def test_what_was_measured_is_read_back(bases):
    plan = choose(bases[1], settings(group_size=32))
    made = measured(random_costs(plan, np.random.default_rng(5)))
    assert from_json(json.loads(json.dumps(made.to_json())), "plan.json") == made
    made.require("a1", "gptq", "plan.json")
    with pytest.raises(PlanError, match=r"plan\.json: was measured on another model"):
        made.require("ff", "gptq", "plan.json")
    with pytest.raises(PlanError, match="for --method gptq, not search"):
        made.require("a1", "search", "plan.json")


def test_a_tensor_that_was_not_measured_is_named(bases):
    plan = choose(bases[0], settings(group_size=32))
    costs = random_costs(plan, np.random.default_rng(6))
    costs.pop("model.layers.1.mlp.down_proj.weight")
    with pytest.raises(PlanError, match=r"layers\.1\.mlp\.down_proj\.weight: what it costs"):
        budget(plan, costs, limit_of(plan, 5))


ONE = {"size": 10, "formats": {"4g64": [0.1, 0.2]}}


@pytest.mark.parametrize(
    "change",
    [
        {"mlxquant_sensitivities": 2},
        {"model": None},
        {"method": "a\x1b[31m"},
        {"calibration": 3},
        {"tensors": []},
        {"tensors": {}},
        {"tensors": {"a\n": ONE}},
        {"tensors": {"a": 3}},
        {"tensors": {"a": ONE | {"size": True}}},
        {"tensors": {"a": ONE | {"size": 0}}},
        {"tensors": {"a": ONE | {"size": 10**400}}},
        {"tensors": {"a": ONE | {"formats": {"9g64": [0.1, 0.2]}}}},
        {"tensors": {"a": ONE | {"formats": {"keep": [0.1, 0.2]}}}},
        {"tensors": {"a": ONE | {"formats": {"4" * 5000 + "g64": [0.1, 0.2]}}}},
        {"tensors": {"a": ONE | {"formats": {"4g64": [0.1]}}}},
        {"tensors": {"a": ONE | {"formats": {"4g64": [float("nan"), 0.2]}}}},
        {"tensors": {"a": ONE | {"formats": {"4g64": [float("inf"), 0.2]}}}},
        {"tensors": {"a": ONE | {"formats": {"4g64": [-0.1, 0.2]}}}},
        {"tensors": {"a": ONE | {"formats": {"4g64": [10**400, 0.2]}}}},
        {"tensors": {"a": ONE | {"formats": {"4g64": [True, 0.2]}}}},
    ],
)
def test_a_file_of_lies_is_one_line(change):
    good = measured({"a": {FORMATS[0]: Cost(1.0, 1.0)}}).to_json()
    with pytest.raises(SourceError, match=r"^plan\.json") as error:
        from_json(good | change, "plan.json")
    assert error.value.message.isprintable()
    assert len(error.value.message) < 200
