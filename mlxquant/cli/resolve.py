"""What MODEL and SRC on the command line mean: a path if there is one, else a Hub id."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxquant.errors import UsageError
from mlxquant.tensors import TensorSpec

if TYPE_CHECKING:
    from mlxquant.convert.gguf_source import GGUFSource


def is_hub_id(text: str) -> bool:
    """Whether `text` is to be looked up on the Hub: an `org/name` (or org/name/file.gguf) that is no path
    here.
    """
    from mlxquant.hub.names import parse_id

    return not _exists(Path(text)) and parse_id(text) is not None


def _exists(path: Path) -> bool:
    """False also for a name that no file can have, such as one too long, where Path.exists raises."""
    return os.path.exists(path)  # noqa: PTH110


def resolve(model: str, revision: str | None = None) -> Path:
    """A model folder or .gguf file on this machine, pulled first if need be. Raises UsageError, HubError."""
    return resolve_source(model, revision)[0]


def resolve_source(source: str, revision: str | None = None) -> tuple[Path, dict[str, Any] | None]:
    """(path, what a converted folder records of its origin; None for a path). Raises UsageError, HubError."""
    path = Path(os.path.expanduser(source))  # noqa: PTH111 - Path's own raises for an unknown ~user
    if _exists(path):
        if revision:
            raise UsageError(f"--revision {revision} is for Hub ids, and {source} is a path", hint="leave it out")
        return path, None
    if not is_hub_id(source):
        raise UsageError(
            f"{source!r} is neither a path that exists nor a Hub id",
            hint="give a model folder, a .gguf file, or an id like org/name",
        )
    if source.endswith(".gguf") and source.count("/") == 1:  # a file that is not there, before any repository
        raise UsageError(f"{source}: no such file", hint="a file on the Hub is written like org/name/file.gguf")
    return _pull(source, revision)


def resolve_headers(
    source: str, revision: str | None
) -> tuple[dict[str, Any], Mapping[str, TensorSpec], Mapping[str, str]]:
    """Config, tensor specs and what is quantized already; for a Hub id from its headers alone."""
    if not is_hub_id(source):
        from mlxquant.convert.sources import open_source

        opened = open_source(resolve(source, revision))
        return opened.config, opened.specs, opened.quantized
    if source.endswith(".gguf"):
        front = remote_gguf(source, revision)
        return front.config, front.specs, front.quantized
    from mlxquant.hub.headers import remote_specs
    from mlxquant.plan.packed import as_floats

    remote = remote_specs(source, revision)
    if not isinstance(remote.config.get("quantization"), dict):
        return remote.config, remote.specs, {}
    config, specs, packed = as_floats(remote.config, remote.specs)
    return config, specs, {name: weight.format for name, weight in packed.items()}


def remote_gguf(source: str, revision: str | None) -> GGUFSource:
    """A .gguf file on the Hub, from its front alone: its rows are not there. Raises HubError and SourceError."""
    from mlxquant.convert.gguf_source import GGUFSource
    from mlxquant.hub.front import read_front

    return read_front(source, revision, GGUFSource, lambda found: found.front_bytes)[0]


def _pull(source: str, revision: str | None) -> tuple[Path, dict[str, Any]]:
    from mlxquant.cli.progress import ByteBar
    from mlxquant.hub.pull import pull

    with ByteBar(f"Pulling {source}") as bar:
        started = False
        shown = 0

        def progress(done: int, total: int) -> None:
            nonlocal started, shown
            if not started:
                bar.start(total, done)
                started = True
            else:
                bar.advance(done - shown)
            shown = done

        pulled = pull(source, revision, progress=progress)
    return pulled.path, {"name": pulled.repo_id, "revision": pulled.revision}
