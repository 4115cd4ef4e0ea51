"""With expansion off, the demo model at 4 bits says the same 64 greedy tokens as stock mlx-lm from the same folder.

Slow: stock mlx-lm makes one or two tokens a second on a CPU. tests/run/test_generate.py shows the same on tiny models.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.cli.runner import mlxquant
from tests.run.test_llamacpp import demo  # noqa: F401 - a fixture

pytestmark = pytest.mark.slow

STOCK = """
import json, sys
import mlx.core as mx
from mlx_lm import load
from mlx_lm.generate import generate_step
model, tokenizer = load(sys.argv[1])
tokens = json.loads(sys.argv[2])
print(json.dumps([int(t) for t, _ in generate_step(mx.array(tokens), model, max_tokens=64)]))
"""
OURS = """
import json, sys
from pathlib import Path
from mlxquant.run.device import prepare
prepare("cpu")
from mlxquant.run.cache import plan_cache
from mlxquant.run.generate import generate
from mlxquant.run.model import load_model
loaded = load_model(Path(sys.argv[1]), expand="off")
run = generate(loaded.model, json.loads(sys.argv[2]), plan_cache(loaded.model).make(), max_tokens=64)
print(json.dumps([token.id for token in run]))
"""


def answer(script: str, folder: object, tokens: list[int]) -> list[int]:
    """Each in a process of its own: stock must not see our BLAS, and neither do we, so that only the loops differ."""
    command = [sys.executable, "-c", script, str(folder), json.dumps(tokens)]
    env = os.environ | {"MLXQUANT_BLAS": "none"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    return json.loads(done.stdout.splitlines()[-1])


def test_64_greedy_tokens(demo, tmp_path):  # noqa: F811
    from mlxquant.run.text import Text

    out = tmp_path / "out"
    assert mlxquant("convert", demo, "-o", out, "--dtype", "bfloat16").code == 0
    text = Text.load(out)
    prompt = text.encode(text.render([{"role": "user", "content": "Write a story about a lighthouse."}]))
    theirs = answer(STOCK, out, prompt)
    assert len(theirs) == 64
    assert answer(OURS, out, prompt) == theirs
