"""The text that models are compared on: a file, a file of a dataset on the Hub, or what every Python ships.

Figures compare only where the text is the same, so a corpus has a label that says what it is, for people, and a hash,
for files.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from mlxquant.errors import SourceError, UnsupportedError, UsageError
from mlxquant.files.reading import InputFile, one_line, shown
from mlxquant.hub.dataset import DATA, dataset_file, is_dataset_id
from mlxquant.units import format_bytes

BUILTIN = "builtin"
# 5,000 windows of 512 tokens. A tokenizer takes 600 bytes a token (measured: SmolLM2's, 15 MB) and 3 s a megabyte.
TEXT_LIMIT_BYTES = 10_000_000


@dataclass(frozen=True)
class Corpus:
    """sha256: hex, of the text in UTF-8."""

    text: str
    label: str
    sha256: str


def load_corpus(spec: str, revision: str | None = None) -> Corpus:
    """The text that `spec` names.

    'builtin': the language reference and source code of the Python that runs this. Other versions of Python have other
    text: the label names the version, the hash tells them apart.

    A file that exists: UTF-8 text, JSON lines with a "text" each (.jsonl, .json), or Parquet with a column "text"
    (which needs pyarrow). Records stand below one another: behind one that does not end its line, a newline is put.

    Else a dataset on the Hub, `org/name` or `org/name/path/of/a/file`, at `revision` or its main branch.

    Raises UsageError where there is no such thing, SourceError for a file that is no text, is empty or too large,
    HubError as `hub.pull` does.
    """
    path = Path(os.path.expanduser(spec))  # noqa: PTH111 - Path's own raises for an unknown ~user
    local = spec == BUILTIN or os.path.exists(path)  # noqa: PTH110 - False also for a name that no file can have
    if local and revision:
        raise UsageError(f"a revision ({revision}) is for datasets of the Hub, and {spec} is none", hint="leave it out")
    if spec == BUILTIN:
        return builtin()
    if local:
        return _corpus(_read(path, str(path)), path.name, str(path))
    if not is_dataset_id(spec):
        raise UsageError(
            f"{spec!r} is neither a text file that exists nor a dataset on the Hub",
            hint=f"give a file, a dataset like org/name or org/name/file.txt, or {BUILTIN!r}",
        )
    if spec.count("/") == 1 and spec.endswith(DATA):  # a file that is not there, before any repository
        raise UsageError(f"{spec}: no such file", hint="a file on the Hub is written like org/name/file.txt")
    file = dataset_file(spec, revision, TEXT_LIMIT_BYTES)
    where = f"{file.repo_id}/{file.name}"
    return _corpus(_read(file.path, where), f"{file.repo_id}@{file.revision[:12]}: {file.name}", where)


def _corpus(text: str, label: str, where: str) -> Corpus:
    if not text.strip():
        raise SourceError(f"{where}: holds no text", hint="name a file of UTF-8 text")
    try:
        data = text.encode()
    except UnicodeEncodeError as error:  # JSON can hold half of a surrogate pair
        raise SourceError(f"{where}: holds {shown(text[error.start])}, which is no character") from error
    return Corpus(text, label, hashlib.sha256(data).hexdigest())


# -- files


def _read(path: Path, where: str) -> str:
    """The text in a file, by the end of its name."""
    file = InputFile(path)
    if path.suffix == ".parquet":
        _check_length(file.nbytes, where)
        return _joined(_parquet_records(path, where), where)
    _check_binary(file.read(0, min(file.nbytes, 4096), "the text"), where)  # before its length: weights are no text
    _check_length(file.nbytes, where)
    data = file.read(0, file.nbytes, "the text")
    _check_binary(data, where)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = f"byte {data[error.start]:#04x} at {error.start:,}"
        raise SourceError(f"{where}: is not UTF-8 ({found})", hint="convert it with `iconv -t UTF-8`") from error
    return _joined(_json_records(text, where), where) if path.suffix in (".jsonl", ".json") else text


def _check_binary(data: bytes, where: str) -> None:
    if b"\0" in data:
        raise SourceError(f"{where}: is binary, expected UTF-8 text", hint="name a text file")


def _check_length(nbytes: int, where: str) -> None:
    if nbytes > TEXT_LIMIT_BYTES:
        found, limit = format_bytes(nbytes), format_bytes(TEXT_LIMIT_BYTES)
        raise SourceError(
            f"{where}: {found} of text, expected at most {limit}", hint="take a part of it, as `head -c 9000000` does"
        )


def _joined(records: Iterable[str], where: str) -> str:
    parts, total = [], 0
    for record in records:
        parts.append(record if record.endswith("\n") else record + "\n")
        total += len(parts[-1])
        _check_length(total, where)
    return "".join(parts)


def _json_records(text: str, where: str) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON strings may hold U+2028
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise SourceError(
                f"{where}: line {number} is not JSON ({one_line(error)[:80]})",
                hint='each line is an object like {"text": "..."}',
            ) from error
        yield _text_of(record, f"{where}: line {number}")


def _text_of(record: Any, where: str) -> str:
    text = record.get("text") if isinstance(record, Mapping) else None
    if not isinstance(text, str):
        raise SourceError(f'{where} has no "text": {shown(record)}', hint='each line is an object like {"text": "..."}')
    return text


def _parquet_records(path: Path, where: str) -> Iterator[str]:
    """The column "text", batch by batch: a small file can hold any amount of equal text."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        hint = "pip install 'mlxquant[parquet]', or name a file of text or JSON lines"
        raise UnsupportedError(f"{where}: Parquet is read by pyarrow, which is not installed", hint=hint) from error
    try:
        with pq.ParquetFile(path) as table:
            if "text" not in table.schema_arrow.names:
                raise SourceError(f'{where}: has no column "text", but {shown(table.schema_arrow.names)}')
            for batch in table.iter_batches(batch_size=1024, columns=["text"]):
                for value in batch.column(0).to_pylist():
                    yield _text_of({"text": value}, f"{where}: a row")
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{where}: cannot be read as Parquet: {one_line(error)[:120]}") from error


# -- what every Python ships

# Modules in pure Python that are the same on every system, and that Linux distributions leave as they are.
SOURCES = (
    "ast", "asyncio/base_events", "asyncio/tasks", "bisect", "calendar", "collections/__init__",
    "concurrent/futures/_base", "configparser", "contextlib", "copy", "csv", "dataclasses", "difflib", "doctest",
    "email/header", "email/message", "enum", "fractions", "functools", "graphlib", "heapq", "html/parser",
    "http/client", "http/cookiejar", "http/server", "imaplib", "inspect", "ipaddress", "json/decoder", "json/encoder",
    "logging/__init__", "logging/handlers", "mailbox", "numbers", "optparse", "pickle", "pickletools", "plistlib",
    "pprint", "queue", "random", "sched", "shlex", "smtplib", "socketserver", "statistics", "string", "textwrap",
    "threading", "timeit", "tokenize", "trace", "traceback", "typing", "unittest/case", "unittest/mock", "urllib/parse",
    "urllib/request", "weakref", "xml/dom/minidom", "xml/etree/ElementTree",
)  # fmt: skip
# A window of 512 tokens is about 2,000 characters. A third of code is prose: docstrings and comments.
_PROSE_CHARS, _CODE_CHARS = 3000, 6000
_BUILTIN_CHARS = 1_200_000


def builtin() -> Corpus:
    """Documentation and source code of this Python by turns, a few pages of each: any beginning of it has both, of many
    topics. Raises SourceError where this Python came without them.
    """
    prose = _by_turns([_pieces(topic, _PROSE_CHARS) for topic in _topics()])
    modules, missing = _modules()
    code = _by_turns([_pieces(module, _CODE_CHARS) for module in modules])
    parts: list[str] = []
    total = 0
    for pair in zip(prose, code, strict=False):
        parts.extend(pair)
        total += sum(map(len, pair))
        if total > _BUILTIN_CHARS:
            break
    version = platform.python_version()
    label = f"built-in: language reference and library source of Python {version} (not WikiText)"
    label += f", without {', '.join(missing)}" if missing else ""
    return _corpus("\n\n\n".join(parts) + "\n", label, f"Python {version}'s own text")


def _topics() -> list[str]:
    """Python's language reference, as `help()` shows it: longest topics first, as shorter ones quote from them, and no
    paragraph twice.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        found = f"Python {platform.python_version()} came without its documentation (pydoc_data)"
        raise SourceError(found, hint="name a text file with --text") from error
    seen: set[str] = set()
    kept = []
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        paragraphs = [(" ".join(part.split()), part) for part in topics[name].split("\n\n")]
        kept.append("\n\n".join(part for key, part in paragraphs if key not in seen))
        seen.update(key for key, _ in paragraphs)
    return [topic for topic in kept if len(topic) >= _PROSE_CHARS / 3]  # of some, only the title is left


def _modules() -> tuple[list[str], list[str]]:
    """(source of each module, names of files that are not there)."""
    library, found, missing = Path(sysconfig.get_path("stdlib")), [], []
    for name in SOURCES:
        try:
            found.append((library / f"{name}.py").read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError):
            missing.append(f"{name}.py")
    return found, missing


def _pieces(text: str, chars: int) -> list[str]:
    """Whole paragraphs, so many that each piece has `chars` or somewhat more. A rest below half joins the last."""
    pieces: list[str] = [""]
    for paragraph in text.strip("\n").split("\n\n"):
        if len(pieces[-1]) >= chars:
            pieces.append("")
        pieces[-1] += f"\n\n{paragraph}" if pieces[-1] else paragraph
    if len(pieces) > 1 and len(pieces[-1]) < chars / 2:
        rest = pieces.pop()
        pieces[-1] += f"\n\n{rest}"
    return pieces


def _by_turns(texts: Sequence[Sequence[str]]) -> Iterator[str]:
    """The first piece of each, then the second of each that has one ..."""
    for row in zip_longest(*texts):
        yield from filter(None, row)
