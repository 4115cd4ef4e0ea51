"""What MODEL of `mlxquant fit` stands for: config and headers, from the Hub, this disk, or a shape in words."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxquant.cli.fit_options import SHAPE_NAMES
from mlxquant.cli.resolve import is_hub_id, remote_gguf, resolve

if TYPE_CHECKING:
    from mlxquant.convert.gguf_source import GGUFSource
    from mlxquant.fit.subject import Subject
    from mlxquant.tensors import TensorSpec

_CONFIG = "config.json"
# What a config.json says of weights that are stored in a scheme we do not read; MLX's own block is `quantization`.
_SCHEME = "quantization_config"
_METHOD_CHARS = 40


def subject_of(model: str | None, options: Mapping[str, Any]) -> Subject:
    """Raises UsageError, SourceError, UnsupportedError and HubError, each naming what was given."""
    if model is None:
        return _of_shape(options)
    path = Path(os.path.expanduser(model))  # noqa: PTH111 - Path's own raises for an unknown ~user
    # os.path, because Path's own raise for a name that no file can have, such as one too long.
    if path.suffix == ".json" and os.path.isfile(path):  # noqa: PTH113
        return _of_config(path)
    if os.path.isfile(path / _CONFIG) and not any(path.glob("*.safetensors")):  # noqa: PTH113
        return _of_config(path / _CONFIG)
    if is_hub_id(model):
        return _remote(model, options["revision"])
    return _local(resolve(model, options["revision"]))


def _of_shape(options: Mapping[str, Any]) -> Subject:
    from mlxquant.errors import SourceError, UsageError
    from mlxquant.families.checkpoint import checkpoint
    from mlxquant.families.proportions import config_of
    from mlxquant.fit.subject import Subject
    from mlxquant.units import parse_count

    given = {name: options[name] for name in SHAPE_NAMES if name != "params" and options[name] is not None}
    try:
        config = config_of(parse_count(options["params"]), **given)
        return Subject(f"a model of {options['params']}", config, checkpoint(config))
    except SourceError as error:  # there is no config.json to mend
        raise UsageError(f"no model of that shape: {error.message.removeprefix('config.json: ')}") from error


def _of_config(path: Path) -> Subject:
    """The model that a config.json alone describes."""
    from mlxquant.files.reading import read_json_object

    name = path.resolve().parent.name if path.name == _CONFIG else path.stem
    return _published(name, read_json_object(path), "from config.json alone: its weights are not here")


def _published(name: str, config: dict[str, Any], remark: str) -> Subject:
    """The checkpoint that a config stands for."""
    from mlxquant.families.checkpoint import checkpoint
    from mlxquant.families.mlx_config import is_mxfp4
    from mlxquant.fit.subject import Subject

    plain = {key: value for key, value in config.items() if key != "quantization"}
    if isinstance(plain.get(_SCHEME), dict) and not is_mxfp4(plain):
        del plain[_SCHEME]
    return Subject(name, plain, checkpoint(plain), remarks=(remark,))


def _of_gguf(name: str, source: GGUFSource) -> Subject:
    from mlxquant.fit.subject import Subject

    file = source.file
    return Subject(name, source.config, source.specs, source.quantized, gguf=(file.typed, file.tensors))


def _of_specs(name: str, config: dict[str, Any], specs: Mapping[str, TensorSpec]) -> Subject:
    """A checkpoint, or an MLX folder whose packed tensors stand for one."""
    from mlxquant.families.mlx_config import is_mxfp4
    from mlxquant.fit.stored import stored_mlx
    from mlxquant.fit.subject import Subject
    from mlxquant.plan.packed import as_floats

    if isinstance(config.get("quantization"), dict):
        plain, floats, packed = as_floats(config, specs)
        rounded = {key: weight.format for key, weight in packed.items()}
        return Subject(name, plain, floats, rounded, stored_mlx(config, specs))
    subject = Subject(name, config, specs)
    if config.get(_SCHEME) and not is_mxfp4(config):
        return _published(
            name, config, f"stored as {_method(config)}, which convert does not read: as the floats of it"
        )
    return subject


def _method(config: Mapping[str, Any]) -> str:
    scheme = config[_SCHEME]
    found = scheme.get("quant_method") if isinstance(scheme, dict) else None
    return found[:_METHOD_CHARS] if isinstance(found, str) else "an unknown scheme"


def _remote(model: str, revision: str | None) -> Subject:
    if model.endswith(".gguf"):
        return _of_gguf(model, remote_gguf(model, revision))
    from mlxquant.hub.headers import remote_specs

    remote = remote_specs(model, revision)
    return _of_specs(model, remote.config, remote.specs)


def _local(path: Path) -> Subject:
    from mlxquant.convert.sources import is_gguf

    if is_gguf(path):
        from mlxquant.convert.gguf_source import GGUFSource

        return _of_gguf(path.name, GGUFSource(path))
    from mlxquant.files.hf_folder import HFFolder

    folder = HFFolder(path)
    return _of_specs(path.resolve().name, folder.config, folder.specs)
