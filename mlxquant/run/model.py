"""Loads a model into mlx-lm's classes. The one place that touches mlx-lm's model loading.

A model is first opened lazily: config and headers are read, every array has its shape and dtype, no weight
is. So the cache can be planned and the memory budget checked before gigabytes are read; `materialize` then
reads them, a few hundred MB at a time.

On a CPU device weights are expanded to float32 where they fit: MLX's quantized matmul is scalar there and
float16 and bfloat16 products do not reach the BLAS. The values are exact: codes times scale plus bias in
float32.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from glob import has_magic
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from mlxquant.convert.sources import is_gguf
from mlxquant.errors import MlxquantError, SourceError, UnsupportedError, UsageError
from mlxquant.families.mlx_config import mlx_config
from mlxquant.files.hf_folder import HFFolder
from mlxquant.machine import probe
from mlxquant.units import format_bytes

if TYPE_CHECKING:
    from mlxquant.run.gguf import GGUFModel

# Schemes of `quantization_config` that mlx-lm reads as what they are. It also takes GPTQ for AWQ (other
# packing, wrong weights) and any packed compressed-tensors for 4 bit, group size 32; those are refused.
READ_SCHEMES = ("bitnet", "mxfp4", "mxfp8", "fp8", "awq", "modelopt")
# Of the working set: what expanded weights may take, so that cache and scratch find room beside them.
EXPAND_SHARE = 0.8
_EVAL_BYTES = 256 * 2**20


@dataclass
class LoadedModel:
    """An mlx-lm model and what is known of it.

    kind: 'mlx' (a folder with quantized or MLX weights), 'hf' or 'gguf'. weight_bytes: as they lie in memory.
    expanded: all floats are float32, nothing is quantized. notes: what to tell the user.
    """

    model: Any
    config: dict[str, Any]
    path: Path
    kind: str
    quantization: str
    weight_bytes: int
    expanded: bool = False
    notes: list[str] = field(default_factory=list)
    _fill: Callable[[], None] | None = None

    def materialize(self) -> LoadedModel:
        """Reads the weights, if that was put off. Raises SourceError when the file is shorter than its header
        says.
        """
        if self._fill:
            try:
                self._fill()
            except (RuntimeError, ValueError) as error:
                raise SourceError(f"{self.path}: weights cannot be read ({_first_line(error)})") from error
            self._fill = None
        return self

    @property
    def vocabulary(self) -> int:
        """Tokens that the model has embeddings for."""
        return int(self.config.get("vocab_size") or self.config["text_config"]["vocab_size"])

    @property
    def context_tokens(self) -> int | None:
        """The longest context the model was made for, None when its config does not say."""
        for config in (self.config.get("text_config") or {}, self.config):
            value = config.get("max_position_embeddings")
            if isinstance(value, int) and value > 0:
                return value
        return None


def load_model(
    path: Path | str, *, expand: str = "auto", lazy: bool = False, memory_bytes: int | None = None
) -> LoadedModel:
    """An MLX folder, a Hugging Face folder or a .gguf file -> LoadedModel. Nothing in it is executed.

    expand        'auto': on a CPU device, when float32 weights take at most 80 % of the memory; 'on';
                  'off'. Never on a GPU, whose kernels read the codes themselves.
    lazy          leave the weights unread until `materialize()`
    memory_bytes  what 'auto' may count on; None: the working set of this machine

    Raises SourceError, UnsupportedError (an unknown family, scheme, or code of its own), UsageError.
    """
    import mlx.core as mx

    path = Path(path)
    if expand not in ("auto", "on", "off"):
        raise UsageError(f"{expand!r} is no way to expand weights", hint="use auto, on or off")
    on_cpu = mx.default_device().type == mx.cpu
    if expand == "on" and not on_cpu:
        raise UsageError("weights are expanded on a CPU device only", hint="add --device cpu, or leave --expand out")
    file: GGUFModel | None = None
    if is_gguf(path):
        loaded, file = _open_gguf(path)
    else:
        loaded = _open_folder(path)
    if on_cpu:
        _expand(loaded, expand, memory_bytes)
    if file and not loaded.expanded:
        file.take_over()
    loaded.weight_bytes = sum(array.nbytes for array in _arrays(loaded.model))
    return loaded if lazy else loaded.materialize()


def _open_folder(path: Path) -> LoadedModel:
    config = dict(HFFolder(path).config)  # checks every header before MLX maps the files
    refuse(config, path)
    from mlx_lm.utils import load_model as load

    try:
        # Without mlx_config stock mlx-lm runs a folder of transformers 5 with its default rope_theta.
        with _without_magic(path) as folder:
            model, config = load(
                folder, lazy=True, strict=True, model_config=mlx_config(config), trust_remote_code=False
            )
    except MlxquantError:
        raise
    except Exception as error:
        raise _explain(error, config, path) from error
    kind = "mlx" if "quantization" in config or "mlxquant" in config else "hf"
    loaded = LoadedModel(model, config, path, kind, describe(config), 0)
    loaded._fill = lambda: evaluate(model)
    return loaded


@contextmanager
def _without_magic(path: Path) -> Iterator[Path]:
    """Another name for a folder that mlx-lm would take for a pattern, as in `[exl2] smol`. The files that it opens stay
    open when the name is gone.
    """
    if not has_magic(str(path)):
        yield path
        return
    with TemporaryDirectory() as scratch:
        link = Path(scratch) / "model"
        link.symlink_to(path.resolve())
        yield link


def _open_gguf(path: Path) -> tuple[LoadedModel, GGUFModel]:
    from mlxquant.convert.gguf_source import GGUFSource
    from mlxquant.run.gguf import GGUFModel

    source = GGUFSource(path)
    try:
        opened = GGUFModel(source)
    except MlxquantError:
        raise
    except Exception as error:
        raise _explain(error, source.config, path) from error
    types = ", ".join(sorted(set(source.quantized.values()))) or "not quantized"
    loaded = LoadedModel(opened.model, source.config, path, "gguf", types, 0)
    loaded._fill = lambda: opened.fill(loaded)
    return loaded, opened


def refuse(config: dict[str, Any], path: Path) -> None:
    """Raises UnsupportedError for configs that want their own code run, or whose weights mlx-lm would
    misread.
    """
    if config.get("model_file"):
        raise UnsupportedError(
            f"{path}: config.json names {config['model_file']!r} as code to run, which mlxquant never does",
            hint="use a model of a family that mlx-lm knows",
        )
    if not isinstance(config.get("model_type"), str):
        raise SourceError(f"{path}: config.json has no model_type", hint="download the folder again")
    text_config = config.get("text_config")
    nested = text_config if isinstance(text_config, dict) else {}
    scheme = config.get("quantization_config") or nested.get("quantization_config")
    if "quantization" in config or not scheme:
        return
    method = scheme.get("quant_method") if isinstance(scheme, dict) else scheme
    if method not in READ_SCHEMES:
        raise UnsupportedError(
            f"{path}: weights are quantized as {method!r}, which cannot be run as it is",
            hint=f"use the float checkpoint it was made from (what can be run: {', '.join(READ_SCHEMES)})",
        )


def describe(config: dict[str, Any]) -> str:
    """'4 bit affine, group size 64', with the number of tensors that differ, or 'not quantized'."""
    scheme = config.get("quantization")
    if not isinstance(scheme, dict):
        return "not quantized"
    exceptions = sum(isinstance(value, dict) or value is False for value in scheme.values())
    text = f"{scheme.get('bits')} bit {scheme.get('mode', 'affine')}, group size {scheme.get('group_size')}"
    return f"{text}, {exceptions} layer{'s' if exceptions > 1 else ''} otherwise" if exceptions else text


def evaluate(model: Any) -> None:
    """Reads and computes lazy weights some hundred MB at a time, so that at most that much of sources is
    alive.
    """
    import mlx.core as mx

    batch: list[Any] = []
    for array in _arrays(model):
        batch.append(array)
        if sum(item.nbytes for item in batch) >= _EVAL_BYTES:
            mx.eval(batch)
            batch = []
    mx.eval(batch)
    mx.clear_cache()


def _expand(loaded: LoadedModel, expand: str, memory_bytes: int | None) -> None:
    from mlxquant.run.expand import expanded_bytes, swap_layers

    needed = expanded_bytes(loaded.model)
    if expand == "off":
        loaded.notes.append("weights stay as they are (--expand off), which is slow on a CPU")
        return
    if expand == "auto":
        allowed = EXPAND_SHARE * (memory_bytes if memory_bytes is not None else probe().working_set_bytes)
        if needed > allowed:
            loaded.notes.append(
                f"float32 weights would take {format_bytes(needed)}, more than {format_bytes(allowed)}: "
                "they stay as they are, which is slow on a CPU"
            )
            return
    left, decode = swap_layers(loaded.model)
    loaded.expanded = not left
    read = loaded._fill or (lambda: None)
    loaded._fill = lambda: (decode(), read())[1]
    loaded.notes.append(f"weights expanded to float32 for the CPU ({format_bytes(needed)})")
    if left:
        loaded.notes.append(f"{len(left)} quantized layers of unknown kind stay as they are, {left[0]} first")


def _arrays(model: Any) -> Iterator[Any]:
    from mlx.utils import tree_flatten

    for _, array in tree_flatten(model.parameters()):
        yield array


def _explain(error: Exception, config: dict[str, Any], path: Path) -> MlxquantError:
    """What mlx-lm's loader meant. Whatever a config or header of lies makes it raise ends here, with its
    cause kept.
    """
    line = _first_line(error)
    if isinstance(error, ValueError) and "not supported" in line:
        return UnsupportedError(
            f"{path}: mlx-lm has no model family {config['model_type']!r}",
            hint="see whether a newer mlx-lm has it",
        )
    return SourceError(f"{path}: config.json and weights do not make a model: {type(error).__name__}: {line}")


def _first_line(error: Exception) -> str:
    text = str(error)
    if "__init__() missing" in text:
        return "config.json lacks" + text.rpartition("argument")[2].removeprefix("s").replace(": ", " ")
    return json.dumps(text.splitlines()[0])[1:-1] if text else "no reason given"
