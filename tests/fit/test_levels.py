"""Levels against files that are really written, and against models that mlx-lm really loads."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import pytest

from mlxquant.codecs.spec import AFFINE_BITS, AFFINE_GROUP_SIZES
from mlxquant.convert.sources import open_source
from mlxquant.errors import UnsupportedError
from mlxquant.files.gguf_file import GGUFFile
from mlxquant.files.hf_folder import HFFolder
from mlxquant.fit.levels import LEVELS, left_out, levels, survey
from mlxquant.fit.stored import stored_gguf, stored_mlx
from mlxquant.fit.subject import Subject
from mlxquant.fit.values import Level
from mlxquant.fit.work import work
from mlxquant.measure.traffic import bytes_per_token
from mlxquant.plan.gguf_types import FILE_TYPES
from tests.cli.runner import mlxquant
from tests.convert.gguf_cases import make as checkpoint
from tests.families.gguf_checkpoints import make as published
from tests.tiny import make

# Tied and untied; experts with biases, beside a shared one and beside a dense part; MLA; delta nets; Mamba; a second
# embedding for all layers; other towers.
IN_GGUF = ("llama", "qwen2", "gemma3", "mixtral", "gpt_oss", "qwen3_next")
FAMILIES = (*IN_GGUF, "deepseek_v3", "nemotron_h", "qwen3_5_moe", "gemma4", "gemma4_text")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = make(tmp_path_factory.mktemp(family), family, width=256, tied=family == "qwen2")
        return made[family]

    return get


def subject_of(path: Path) -> Subject:
    source = open_source(path)
    return Subject(path.name, source.config, source.specs, source.quantized)


def written_bytes(out: Path) -> tuple[int, int]:
    """(bytes of all tensors, of the largest) by the file's own header; files hold nothing beside header and tensors."""
    if out.suffix == ".gguf":
        reader = gguf.GGUFReader(out)
        sizes = [int(tensor.n_bytes) for tensor in reader.tensors]
        padded = sum(size + -size % reader.alignment for size in sizes)
        assert out.stat().st_size == reader.data_offset + padded
        return sum(sizes), max(sizes)
    sizes = []
    for file in sorted(out.glob("*.safetensors")):
        data = file.read_bytes()
        header = int.from_bytes(data[:8], "little")
        entries = [e for name, e in json.loads(data[8 : 8 + header]).items() if name != "__metadata__"]
        here = [stop - start for start, stop in (entry["data_offsets"] for entry in entries)]
        assert len(data) == 8 + header + sum(here)
        sizes += here
    return sum(sizes), max(sizes)


def write(source: Path, level: Level, out: Path) -> Path:
    """By the words that the level names."""
    out = out / ("out.gguf" if level.format == "gguf" else "out")
    result = mlxquant("convert", source, "-o", out, "--force", *level.options)
    assert result.code == 0, result
    return out


def check(source: Path, level: Level, out: Path) -> None:
    made = write(source, level, out)
    assert (level.nbytes, level.largest_bytes) == written_bytes(made), level.key
    if level.format == "mlx":  # GGUF's estimate is of real tokenizers: tests/families/test_checkpoint.py
        others = sum(file.stat().st_size for file in made.glob("*.safetensors")) - level.nbytes
        assert level.header_bytes == pytest.approx(others, rel=0.2), level.key
    shutil.rmtree(made) if made.is_dir() else made.unlink()


@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_are_those_on_disk(folder, tmp_path, family):
    found = levels(subject_of(folder(family)))
    assert found[0].nbytes == written_bytes(folder(family))[0]  # the checkpoint as it is, with all it holds
    shown = [key for key in LEVELS if family in IN_GGUF or key.startswith("mlx")]
    assert sorted(level.key for level in found[1:]) == sorted(shown)
    for level in found[1:]:
        check(folder(family), level, tmp_path)


def test_bytes_of_every_level_are_those_on_disk(folder, tmp_path):
    """Every bits, group size, recipe, mode and file type."""
    source = folder("mixtral")
    found = survey(subject_of(source), all=True)
    count = len(AFFINE_BITS) * len(AFFINE_GROUP_SIZES) * 2 + 3 * 2 + 4 * len(AFFINE_GROUP_SIZES) + len(FILE_TYPES)
    assert len({level.key for level in found.levels[1:]} | found.refused.keys()) == count
    assert len({level.options for level in found.levels}) == len(found.levels)
    assert found.refused.keys() == {"gguf Q2_K_S"}
    for level in found.levels[1:]:
        if level.key not in LEVELS:  # those are written above
            check(source, level, tmp_path)


def loaded(path: Path):
    from mlx_lm.utils import load_model

    return load_model(path, lazy=True)


def parameter_bytes(model) -> list[int]:
    from mlx.utils import tree_flatten

    return [array.nbytes for _, array in tree_flatten(model.parameters())]


def leaves(model) -> dict:
    import mlx.nn as nn
    from mlx.utils import tree_flatten

    return dict(tree_flatten(model.leaf_modules(), is_leaf=lambda module: isinstance(module, nn.Module)))


def embedding_row_bytes(model) -> int:
    """One row of each embedding that is not the head as well, which `bytes_per_token` counts as nothing."""
    import mlx.nn as nn

    tied = not any("lm_head" in name for name in leaves(model))
    rows = 0
    for name, module in leaves(model).items():
        if isinstance(module, (nn.Embedding, nn.QuantizedEmbedding)) and ("per_layer" in name or not tied):
            rows += sum(parameter_bytes(module)) // module.weight.shape[0]
    return rows


def loose_bytes(model) -> int:
    """Parameters of modules that hold other modules (sinks, decays), which `bytes_per_token` does not see."""
    return sum(parameter_bytes(model)) - sum(sum(parameter_bytes(leaf)) for leaf in leaves(model).values())


def check_loaded(level: Level, path: Path) -> None:
    model, config = loaded(path)
    sizes = parameter_bytes(model)
    assert level.loaded_bytes == sum(sizes), level.key
    assert level.largest_bytes == max(sizes)
    read = bytes_per_token(model, config) + embedding_row_bytes(model) + loose_bytes(model)
    assert level.token_bytes == read, level.key


@pytest.mark.parametrize("family", FAMILIES)
def test_memory_and_traffic_are_those_of_the_loaded_model(folder, tmp_path, family):
    """As mlx-lm loads it: the checkpoint itself, and a level with 6 and 8 bits among 3."""
    found = {level.key: level for level in levels(subject_of(folder(family)))}
    check_loaded(found["mlx bf16"], folder(family))
    check_loaded(found["mlx 3-bit"], write(folder(family), found["mlx 3-bit"], tmp_path))


# -- what is quantized already, and GGUF files


def stored_of(folder: Path) -> Subject:
    opened = HFFolder(folder)
    source = open_source(folder)
    stored = stored_mlx(opened.config, opened.specs)
    return Subject(folder.name, source.config, source.specs, source.quantized, stored)


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen3_next"])
def test_a_quantized_folder_is_at_its_level_and_is_not_rounded_again(folder, tmp_path, family):
    planned = next(level for level in levels(subject_of(folder(family))) if level.key == "mlx 3-bit")
    made = write(folder(family), planned, tmp_path)
    found = survey(stored_of(made), all=True)
    stored = found.levels[0]
    assert (stored.key, stored.options) == ("mlx 3-bit", ())
    for name in ("nbytes", "loaded_bytes", "largest_bytes", "token_bytes", "size"):
        assert getattr(stored, name) == getattr(planned, name), name
    # convert writes floats of it unasked, and nothing that rounds.
    assert {level.key for level in found.levels[1:]} == {"gguf F32", "gguf F16", "gguf BF16"}
    assert "mlx 3-bit" not in found.refused
    assert all("second loss" in found.refused[key] for key in ("mlx 4-bit", "gguf Q8_0"))
    check(made, found.levels[1], tmp_path)


def subject_of_gguf(path: Path) -> Subject:
    source, file = open_source(path), GGUFFile(path)
    return Subject(path.name, source.config, source.specs, source.quantized, gguf=(file.typed, file.tensors))


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_quantized_file_is_at_its_level_and_its_blocks_are_taken_over(folder, tmp_path, family):
    planned = next(level for level in levels(subject_of(folder(family))) if level.key == "gguf Q4_K_M")
    made = write(folder(family), planned, tmp_path)
    found = survey(subject_of_gguf(made))
    stored, repacked = found.levels
    assert stored.key == "gguf Q4_K_M"
    assert 0 <= made.stat().st_size - stored.nbytes - stored.header_bytes < 32 * 50  # padding
    for name in ("nbytes", "loaded_bytes", "largest_bytes", "token_bytes", "size"):
        assert getattr(stored, name) == getattr(planned, name), name
    assert repacked.key == "mlx repack"
    check(made, repacked, tmp_path)
    assert found.refused.keys() == {key for key in LEVELS if key != "gguf Q4_K_M"}


def test_what_is_made_of_a_float_file(folder, tmp_path):
    """Through the plan from one GGUF file to another, and through MLX's."""
    result = mlxquant("convert", folder("llama"), "-o", tmp_path / "source.gguf", "--type", "BF16")
    assert result.code == 0, result
    found = levels(subject_of_gguf(tmp_path / "source.gguf"))
    assert found[0].key == "gguf BF16"
    assert sorted(level.key for level in found[1:]) == sorted(LEVELS)
    for level in found[1:]:
        if level.name in ("4-bit", "mxfp4", "Q4_K_M", "IQ4_XS"):
            check(tmp_path / "source.gguf", level, tmp_path)


def test_a_file_type_of_others_goes_by_its_commonest_type(folder, tmp_path):
    mlxquant("convert", folder("llama"), "-o", tmp_path / "a.gguf", "--type", "Q6_K")
    file = GGUFFile(tmp_path / "a.gguf")
    assert stored_gguf(file.typed | {"general.file_type": 99}, file.tensors).name == "Q6_K"


def test_gpt_oss_as_published(tmp_path):
    """Experts in MXFP4: mlx-lm loads them as they are, GGUF keeps them, and no MLX plan takes them."""
    source = checkpoint(tmp_path / "model", "gpt_oss")
    found = survey(subject_of(source))
    assert found.levels[0].key == "mlx mxfp4"
    check_loaded(found.levels[0], source)
    assert found.refused["mlx 4-bit"].startswith("config.json: the source is already quantized (mxfp4")
    for level in found.levels[1:]:
        assert level.format == "gguf"
        check(source, level, tmp_path)


def test_a_checkpoint_that_only_gguf_reads(tmp_path):
    """Experts that transformers 5 fused."""
    source = published(tmp_path / "model", "qwen2_moe-fused")
    found = survey(subject_of(source))
    assert {level.format for level in found.levels} == {"gguf"}
    assert mlxquant("convert", source, "--dry-run").code == 1
    assert work(subject_of(source)).moe


# -- refusals and remarks


def test_a_reason_is_the_one_that_convert_gives(tmp_path):
    """Rows of 160 weights: no group of 64 divides them."""
    source = make(tmp_path / "model", "llama", width=160)
    reasons = survey(subject_of(source), all=True).refused
    asked = {f"mlx {b}-bit uniform": f"--bits {b} --recipe uniform" for b in AFFINE_BITS}
    asked |= {"mlx 4-bit g128 uniform": "--group-size 128 --recipe uniform", "mlx mixed_3_6": "--recipe mixed_3_6"}
    assert reasons.keys() >= asked.keys()
    for key, words in asked.items():
        result = mlxquant("convert", source, "--dry-run", *words.split())
        assert (result.code, reasons[key] in result.err) == (1, True), key


def test_a_family_that_gguf_has_no_table_for(folder):
    reasons = survey(subject_of(folder("deepseek_v3"))).refused
    assert reasons.keys() == {key for key in LEVELS if key.startswith("gguf")}
    assert "deepseek_v3" in reasons["gguf Q8_0"]


def test_a_model_that_nobody_loads_is_an_error(folder):
    source = open_source(folder("llama"))
    fp8 = source.config | {"quantization_config": {"quant_method": "fp8"}}
    with pytest.raises(UnsupportedError, match="already quantized"):
        levels(Subject("x", fp8, source.specs))


@pytest.mark.parametrize("family", ["gemma3", "qwen3_next", "gemma4"])
def test_what_is_left_out_is_named_with_its_bytes(folder, family):
    subject = subject_of(folder(family))
    found = left_out(subject)
    as_it_is = levels(subject)[0]
    assert [tensors > 0 for _, tensors, _ in found] == [True] * {"gemma4": 3}.get(family, 1)
    assert sum(nbytes for *_, nbytes in found) == as_it_is.nbytes - as_it_is.loaded_bytes
    assert all(any(reason in remark for remark in as_it_is.remarks) for reason, *_ in found)


def test_what_is_the_same_of_many_tensors_is_said_once(tmp_path):
    source = make(tmp_path / "model", "llama", width=160)
    found = {level.key: level for level in levels(subject_of(source))}
    (remark,) = (r for r in found["mlx 4-bit"].remarks if "4g32" in r)
    assert remark.endswith(" more: width 160 is not a multiple of 64: becomes 4g32")


def test_nothing_heavy_is_loaded(folder):
    code = (
        "import sys\nfrom mlxquant.convert.sources import open_source\nfrom mlxquant.fit.subject import Subject\n"
        "from mlxquant.fit.levels import levels\nfrom mlxquant.fit.work import work\nfrom pathlib import Path\n"
        "s = open_source(Path(sys.argv[1])); s = Subject('', s.config, s.specs); assert len(levels(s)) > 10; work(s)\n"
        "heavy = ('mlx', 'mlx_lm', 'transformers', 'numba', 'tokenizers', 'gguf', 'torch')\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder("llama"))], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


# -- real models


def planned_bytes(source: Path, level: Level) -> int:
    result = mlxquant("convert", source, "--dry-run", "--json", *level.options)
    assert result.code == 0, result
    return json.loads(result.out)["bytes"]


WRITTEN_OF_QWEN = ("mlx 8-bit", "mlx 4-bit", "mlx mxfp4", "gguf Q8_0", "gguf Q4_K_M", "gguf Q2_K")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smol", "qwen"])
def test_bytes_of_real_models(name, tmp_path):
    """Of smol every level is written, of qwen a few, each deleted again: minutes. The others' bytes are the plan's."""
    source = Path(os.environ.get("MLXQUANT_MODELS", "")) / name
    if "MLXQUANT_MODELS" not in os.environ or not (source / "config.json").is_file():
        pytest.skip(f"no model {name}: set MLXQUANT_MODELS to the folder that holds it")
    found = levels(subject_of(source), all=True)
    check_loaded(found[0], source)
    for level in found[1:]:
        if name == "smol" or level.key in WRITTEN_OF_QWEN:
            check(source, level, tmp_path)
        else:
            assert level.nbytes == planned_bytes(source, level), level.key
