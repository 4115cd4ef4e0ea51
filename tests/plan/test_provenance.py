"""What GGUF keys say of how a file was made."""

from __future__ import annotations

import json

import gguf
import pytest

from mlxquant.plan.provenance import provenance


@pytest.mark.parametrize("known", [t for t in gguf.LlamaFileType if t is not gguf.LlamaFileType.GUESSED])
def test_every_file_type_of_the_gguf_package_has_its_name(known: gguf.LlamaFileType):
    name = {"ALL_F32": "F32"}.get(known.name, known.name.removeprefix("MOSTLY_"))
    assert provenance({"general.file_type": int(known)}) == {"file_type": name}


def test_ours():
    source = json.dumps({"name": "org/tiny", "revision": "0123abc"})
    keys = {"mlxquant.version": "9.9", "mlxquant.source": source, "quantize.imatrix.file": "w.dat"}
    made = {"made_by": "mlxquant 9.9", "made_from": "org/tiny at 0123abc", "imatrix": "w.dat"}
    assert provenance(keys | {"general.license": "mit"}) == made | {"licence": "mit"}


@pytest.mark.parametrize("source", ["", "[1]", "7", "{}", "[" * 100_000])
def test_keys_of_nonsense_say_nothing(source: str):
    assert provenance({"mlxquant.source": source, "general.file_type": "x", "general.license": ["mit"]}) == {}
    assert provenance({"general.file_type": 777}) == {"file_type": "777"}
