"""Is this folder what its plan said? Everything `verify` can find out without running the model."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlxquant import __version__
from mlxquant.codecs.floats import widen
from mlxquant.codecs.spec import KEEP, Codec, parse_codec
from mlxquant.convert import sidecars
from mlxquant.convert.gather import rows
from mlxquant.convert.manifest import NAME, sha256
from mlxquant.convert.sources import OpenSource
from mlxquant.convert.weight_checks import Promise, compare_weights
from mlxquant.errors import MlxquantError, SourceError
from mlxquant.families.roles import Role
from mlxquant.files.hf_folder import HFFolder
from mlxquant.files.reading import one_line, plain_name, read_json_object, shown
from mlxquant.plan.plan import Plan, make_plan
from mlxquant.plan.recipe import RTN, SEARCH, Settings, settings
from mlxquant.tensors import DTYPES, FLOAT_CODES, TensorSpec

LABELS = {d.label: d.code for d in DTYPES.values()}
READ_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Check:
    """One line of `verify`'s report."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class Written:
    """A converted folder with its manifest. `folder.specs` is what its files hold, `planned` what they should."""

    folder: HFFolder
    manifest: dict[str, Any]

    @property
    def planned(self) -> dict[str, TensorSpec]:
        return {part.name: part for t in self.manifest["plan"]["tensors"] for part in parts_of(t)}

    @property
    def codecs(self) -> dict[str, Codec]:
        return {t["name"]: parse_codec(t["codec"]) for t in self.manifest["plan"]["tensors"]}

    @property
    def stored(self) -> dict[str, tuple[str, Codec]]:
        """How each weight was rounded: (dtype of what stays float, codec). Blocks that were taken over were not."""
        return {
            t["name"]: (t["dtype"], KEEP if "repacked_from" in t else parse_codec(t["codec"]))
            for t in self.manifest["plan"]["tensors"]
        }

    @property
    def settings(self) -> Settings:
        s = self.manifest["plan"]["settings"]
        wanted = {k: s[k] for k in ("bits", "group_size", "mode", "recipe")}
        dtype = DTYPES[s["dtype"]].label if s["dtype"] else None
        sets = tuple(f"{pattern}={codec}" for pattern, codec in s["sets"])
        codecs = tuple((name, codec) for name, codec in s.get("codecs", ()))
        method = s.get("method", RTN)
        again = bool(s.get("requantize", False))
        rotate = bool(s.get("rotate", False))
        return settings(**wanted, dtype=dtype, sets=sets, requantize=again, codecs=codecs, method=method, rotate=rotate)

    @property
    def promise(self) -> Promise:
        """How codes were chosen, and so how near they must be. What `best` did to the weights before is in the
        manifest's calibration, as a list of names under "transforms".
        """
        method, calibration = self.settings.method, self.manifest.get("calibration")
        searched_here = self.manifest["mlxquant"] == __version__
        if calibration is None and method in (RTN, SEARCH):
            return Promise(method, searched_here=searched_here)
        said = list((calibration or {}).get("transforms", ()))
        done = {*map(str, said), *(("rotate",) if self.settings.rotate else ()), *(("awq",) if method == "awq" else ())}
        transforms = tuple(sorted(done))
        return Promise(method, True, transforms, searched_here)


def parts_of(tensor: dict[str, Any]) -> tuple[TensorSpec, ...]:
    codec = parse_codec(tensor["codec"])
    return codec.parts(tensor["name"], tuple(tensor["shape"]), LABELS[tensor["dtype"]])


def open_written(path: Path) -> Written:
    """Raises SourceError when the folder or its manifest cannot be read."""
    manifest_path = path / NAME
    if not os.path.exists(path):  # noqa: PTH110 - Path's own raises for a name that is too long
        raise SourceError(f"{path}: no such folder", hint="verify a folder that `mlxquant convert` wrote")
    if path.is_dir() and not manifest_path.is_file():
        raise SourceError(
            f"{path}: has no {NAME}, so it was not written by mlxquant (or not finished)",
            hint="verify a folder that `mlxquant convert` wrote",
        )
    folder = HFFolder(path)
    try:
        written = Written(folder, read_json_object(manifest_path))
        check_manifest(written)
    except (ValueError, LookupError, TypeError, AttributeError, MlxquantError) as error:
        raise SourceError(f"{manifest_path}: not a manifest: {shown(one_line(error))}", hint="convert again") from error
    return written


def check_manifest(written: Written) -> None:
    """Reads once all that the checks rely on, so that whatever is wrong with a manifest comes out here; names too,
    for they are opened and printed. Raises all sorts of errors."""
    manifest = written.manifest
    _ = (
        written.settings,
        written.promise,
        manifest["plan_sha256"],
        manifest["tensors"].items(),
        manifest["files"].items(),
    )
    names = [*written.planned, *written.codecs, *(t["role"] for t in manifest["plan"]["tensors"])]
    names += written.promise.transforms
    if wrong := [name for name in names if not name.isprintable()]:
        raise ValueError(f"{shown(wrong[0])} is no name")
    if wrong := [name for name in manifest["files"] if not all(map(plain_name, name.split("/")))]:
        raise ValueError(f"{shown(wrong[0])} is no file of this folder")


def check_folder(
    path: Path, source: OpenSource | None, advance: Callable[[int], None] | None = None
) -> Iterator[Check]:
    """Yields each check as it is done; a later one may rest on an earlier one's success, so stop at a broken folder."""
    written = open_written(path)
    specs = check_specs(written)
    yield specs
    yield check_config(written)
    yield check_checksums(written, advance)
    yield check_files(written, source)
    yield check_head(written)
    yield check_eos(written)
    if source is None:
        yield check_norms(written, None)
        return
    plan = make_plan(source.config, source.specs, written.settings, source.quantized)
    same = plan.digest() == written.manifest["plan_sha256"]
    yield Check(
        "plan", same, "the source gives the same plan" if same else "the source gives another plan: not this source"
    )
    if same and specs.ok:
        yield check_weights(written, source, plan, advance)
        # A transform may fold norms into what reads them.
        yield check_norms(written, None if written.promise.transforms else (source, plan))


def check_specs(written: Written) -> Check:
    """Names, shapes and dtypes in the files against the plan's."""
    found, planned = dict(written.folder.specs), written.planned
    for name in sorted(found.keys() | planned.keys()):
        is_, should_be = found.get(name), planned.get(name)
        if is_ != should_be:
            return Check("specs", False, f"{shown(name)}: found {_show(is_)}, planned {_show(should_be)}")
    return Check("specs", True, f"{len(found)} tensors as planned, {sum(s.nbytes for s in found.values()):,} bytes")


def _show(spec: TensorSpec | None) -> str:
    return f"{spec.dtype} {list(spec.shape)}" if spec else "nothing"


def check_config(written: Written) -> Check:
    """config.json must tell a stock loader each module's format; a wrong entry loads and answers nonsense."""
    block = written.folder.config.get("quantization")
    quantized = {n.removesuffix(".weight"): c for n, c in written.codecs.items() if c.quantized}
    if not quantized:
        return Check("config", not block, "nothing is quantized" if not block else "a quantization block, but no codes")
    if not isinstance(block, dict):
        return Check("config", False, "config.json has no quantization block")
    base = {k: block.get(k) for k in ("group_size", "bits", "mode")}
    for module, codec in quantized.items():
        if block.get(module, base) != codec.mlx_config():
            says = shown(block.get(module, base))
            return Check("config", False, f"{module}: config.json says {says}, stored as {codec.label}")
    return Check("config", True, f"{len(quantized)} modules declared as stored")


def check_checksums(written: Written, advance: Callable[[int], None] | None) -> Check:
    sums = written.manifest["tensors"]
    for name, spec in written.folder.specs.items():
        if sums.get(name) != hash_tensor(written.folder, spec, advance):
            return Check("checksums", False, f"{name}: its bytes have changed since it was written")
    return Check("checksums", True, f"{len(sums)} tensors unchanged since they were written")


def hash_tensor(folder: HFFolder, spec: TensorSpec, advance: Callable[[int], None] | None) -> str:
    digest = hashlib.sha256()
    step = max(1, READ_BYTES * spec.rows // max(1, spec.nbytes))
    for start in range(0, spec.rows, step):
        data = np.ascontiguousarray(folder.read_rows(spec.name, start, min(start + step, spec.rows)))
        digest.update(data.data)
        if advance:
            advance(data.nbytes)
    return digest.hexdigest()


def check_files(written: Written, source: OpenSource | None) -> Check:
    """Tokenizer, template and the rest: unchanged since written, and byte for byte the source's."""
    folder = written.folder.path
    for name, expected in written.manifest["files"].items():
        path = folder / name
        if not path.is_file() or sha256(sidecars.read_small(path)) != expected:
            return Check("files", False, f"{name}: {'changed' if path.is_file() else 'missing'} since it was written")
    if added := sorted(loaded_files(written.folder) - written.manifest["files"].keys()):
        return Check("files", False, f"{shown(added[0])}: was not written here, and a loader would read it")
    if source is None:
        return Check("files", True, f"{len(written.manifest['files'])} files unchanged")
    files = source.sidecars()
    expected_files = sidecars.written_sidecars(files, sidecars.ends_of(source.config, files))
    for name, data in expected_files.items():
        if not (folder / name).is_file() or sidecars.read_small(folder / name) != data:
            return Check("files", False, f"{name}: not the source's")
    return Check("files", True, f"{len(expected_files)} files as in the source")


def loaded_files(folder: HFFolder) -> set[str]:
    """What loaders take from the folder beside the weights that the index names; stock mlx-lm reads each
    model*.safetensors there is, the later one winning."""
    weights = {path.name for path in folder.path.glob("model*.safetensors")} - {file.path.name for file in folder.files}
    return weights | {n for n in sidecars.sidecar_names(folder.path) if not n.startswith(("LICENSE", "NOTICE"))}


def check_head(written: Written) -> Check:
    """A tied model has no head of its own; an untied one must have one, or a loader ties it silently."""
    text = written.folder.config.get("text_config")
    config = written.folder.config | (text if isinstance(text, dict) else {})
    has_head = any(n.split(".")[-2:-1] == ["lm_head"] for n in written.folder.specs)
    tied = config.get("tie_word_embeddings")
    if tied is None:
        return Check("head", True, "own head" if has_head else "tied, by the family's default")
    if tied and has_head:
        return Check("head", False, "config.json ties the head to the embedding, but lm_head is stored")
    if not tied and not has_head:
        return Check("head", False, "config.json says the head is untied, but no lm_head is stored")
    return Check("head", True, "tied to the embedding" if tied else "own head")


def check_eos(written: Written) -> Check:
    """Stock mlx-lm, reading this folder, must stop at every id that ends an answer."""
    ends = sidecars.ends_of(written.folder.config, sidecars.folder_sidecars(written.folder.path), listed=False)
    if ends.missed:
        return Check("eos", False, f"stock mlx-lm would not stop at {ends.missed} (stops at {sorted(ends.stock)})")
    if not ends.ids:
        return Check("eos", False, "no end-of-sequence id anywhere: answers would never stop")
    return Check("eos", True, f"stops at {list(ends.ids)}")


def check_weights(written: Written, source: OpenSource, plan: Plan, advance: Callable[[int], None] | None) -> Check:
    """Each stored tensor against the source, by what its way of choosing codes promises: weight_checks.py."""
    ok, detail = compare_weights(written.folder, source, plan, written.promise, advance)
    return Check("weights", ok, detail)


def check_norms(written: Written, against: tuple[OpenSource, Plan] | None) -> Check:
    """The means of the norm weights: a 1 + w shift done twice, or not at all, shows there and nowhere else."""
    tensors = [
        t
        for t in written.manifest["plan"]["tensors"]
        if t["role"] == Role.NORM.value and t["name"].endswith("weight") and t["name"] in written.folder.specs
    ]
    means = {t["name"]: _mean(written.folder, t["name"]) for t in tensors}
    if against:
        source, plan = against
        for t in plan.tensors:
            if t.name in means:
                spec = TensorSpec(t.name, t.target.shape, t.target.dtype)
                expected = float(widen(rows(source, t.target, 0, spec.rows), t.target.dtype).mean())
                if abs(means[t.name] - expected) > 0.01 * max(1.0, abs(expected)):
                    return Check("norms", False, f"{t.name}: mean {means[t.name]:.3f}, expected {expected:.3f}")
    overall = float(np.mean(list(means.values()))) if means else 1.0
    return Check("norms", True, f"{len(means)} norms, mean {overall:.3f}")


def _mean(folder: HFFolder, name: str) -> float:
    spec = folder.specs[name]
    if spec.dtype not in FLOAT_CODES.values():
        raise SourceError(f"{name}: a norm stored as {spec.dtype}, expected a float dtype")
    return float(widen(folder.read_rows(name, 0, spec.rows), spec.dtype).mean())
