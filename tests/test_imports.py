"""The house's arrows: who may import whom. The second test shows that the first one can fail."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "mlxquant"
FLOORS = [
    {"errors"},
    {"tensors", "units", "macs", "machine"},
    {"codecs", "files", "families", "hub"},
    {"plan"},
    {"fit"},
    {"convert"},
    {"run"},
    {"measure"},
    {"calibrate"},
    {"cli"},
]
FLOOR = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
VALUES = {"files.source", "families.layout", "codecs.spec"}  # plain values that any room may hold


def imports(path: Path) -> set[str]:
    """Dotted names below `mlxquant.` that a file imports, at any depth of nesting."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
        found |= {n.removeprefix("mlxquant.") for n in names if n.startswith("mlxquant.")}
    return found


def turned_arrows(package: Path) -> list[str]:
    """Imports that go upward, or sideways between rooms of one floor."""
    wrong = []
    for path in sorted(package.rglob("*.py")):
        room = path.relative_to(package).parts[0].removesuffix(".py")
        if room not in FLOOR:
            continue
        for name in imports(path):
            target = name.split(".")[0]
            if target == room or target not in FLOOR or any(name.startswith(v) for v in VALUES):
                continue
            if name in {v.split(".")[0] for v in VALUES} and FLOOR[target] <= FLOOR[room]:
                continue  # `from mlxquant.files import source` is told by its second, longer name
            if FLOOR[target] > FLOOR[room] or (FLOOR[target] == FLOOR[room] == 2):
                wrong.append(f"{path.relative_to(package)} imports {name}")
    return wrong


def test_arrows_point_one_way():
    assert turned_arrows(PACKAGE) == []


def test_no_room_and_no_import_escapes_the_law():
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")}
    assert rooms == FLOOR.keys() | {"__init__", "__main__"}
    nodes = [node for path in PACKAGE.rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))]
    assert [node for node in nodes if isinstance(node, ast.ImportFrom) and node.level] == [], "relative imports"


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("plan/plan.py", "from mlxquant.convert.to_mlx import to_mlx"),
        ("codecs/affine.py", "import mlxquant.files.hf_folder"),
        ("run/model.py", "from mlxquant.cli import main"),
        ("errors.py", "from mlxquant.tensors import DTYPES"),
    ],
)
def test_a_turned_arrow_is_found(tmp_path, file, line):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(line)
    assert len(turned_arrows(tmp_path)) >= 1


HEAVY = ("mlx", "mlx_lm", "transformers", "numba", "tokenizers", "torch")


def loaded_after(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint('\\n'.join(m for m in {HEAVY!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split()) & set(HEAVY)


def test_importing_the_package_loads_nothing_heavy():
    assert loaded_after("import mlxquant, mlxquant.plan, mlxquant.cli") == set()


def test_the_sys_modules_check_can_fail():
    assert "numba" in loaded_after("import numba")
