"""Strings to tokens and back. Nothing else in `run` sees text.

Tokenizers are loaded through mlx-lm (which knows families with templates of their own), never with remote
code.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlxquant.convert.sidecars import ends_of, parse
from mlxquant.convert.sources import open_source
from mlxquant.errors import SourceError, UnsupportedError, UsageError
from mlxquant.run.sampling import suggested

Message = dict[str, str]  # {"role": "user", "content": "..."}
_BROKEN = "\N{REPLACEMENT CHARACTER}"


@dataclass
class Text:
    """One model's tokenizer, chat template, end-of-sequence ids, and the sampling its generation_config.json wants."""

    tokenizer: Any
    eos_ids: tuple[int, ...]
    name: str
    sampling: dict[str, float] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path | str) -> Text:
        """From a model folder or a .gguf file. Raises SourceError when there is no tokenizer that can be
        read.
        """
        path = Path(path)
        source = open_source(path)
        sidecars = source.sidecars()
        if path.is_dir():
            tokenizer = _load(path, path)
        else:
            with tempfile.TemporaryDirectory(prefix="mlxquant-tokenizer-") as folder:
                for name, content in sidecars.items():
                    (Path(folder) / name).write_bytes(content)
                tokenizer = _load(Path(folder), path)
        ids = set(ends_of(source.config, sidecars).ids) | set(tokenizer.eos_token_ids)
        return cls(tokenizer, tuple(sorted(ids)), path.name, suggested(parse(sidecars, "generation_config.json")))

    @property
    def has_template(self) -> bool:
        return bool(self.tokenizer.has_chat_template)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids; `special`: with what the tokenizer puts around a text, such as a beginning-of-sequence
        token.

        A text that brings that token itself (a rendered template) does not get it twice. Raises UsageError for what
        cannot be text: a half of a surrogate pair, or a byte that was no UTF-8.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            line = text[max(error.start - 20, 0) : error.start].rpartition("\n")[2]
            raise UsageError(f"no UTF-8 after {line!r}", hint="see which encoding the text has") from error
        begin = self.tokenizer.bos_token
        return list(self.tokenizer.encode(text, add_special_tokens=special and not (begin and text.startswith(begin))))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens and spaces included, as the streaming decoder gives it."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The conversation as the model's template writes it. Raises UnsupportedError without one, UsageError
        when the template refuses (many take no system role, or want user and assistant in turn)."""
        if not self.has_template:
            raise UnsupportedError(
                f"{self.name}: has no chat template, so it is a base model that continues text",
                hint="use `mlxquant generate --no-template`",
            )
        from jinja2 import TemplateError

        try:
            return str(
                self.tokenizer.apply_chat_template(
                    list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
                )
            )
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages[:4])
            raise UsageError(
                f"{self.name}: the chat template refuses {roles}: {error}", hint="try without a system prompt"
            ) from error

    def stream(self) -> Stream:
        return Stream(self)


def _load(folder: Path, named: Path) -> Any:
    import os

    # transformers counts PyTorch's absence as news at each start.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from mlx_lm.tokenizer_utils import load

    try:
        return load(folder, {"trust_remote_code": False, "local_files_only": True})
    except Exception as error:  # whatever transformers makes of a broken or hostile file; the cause is kept
        reason = (str(error).splitlines() or ["no reason given"])[0]
        if not (folder / "tokenizer.json").exists():
            reason = "there is no tokenizer.json"
        raise SourceError(
            f"{named}: its tokenizer cannot be read: {reason}",
            hint="see that tokenizer.json is there and whole",
        ) from error


class Stream:
    """Token ids in, text out, as soon as it is whole: `"".join(feed(id) for ids) + finish() == decode(ids)`.

    A character of several tokens appears with its last. Each step decodes only the last few tokens, with
    those before them as context, because what a token says can depend on its neighbours. (mlx-lm's own
    streaming decoders drop the space that a continuation begins with.)
    """

    def __init__(self, text: Text) -> None:
        self._text = text
        self._ids: list[int] = []
        self._context = 0  # ids[context:read] have been given out and are decoded again as context
        self._read = 0

    def feed(self, token: int) -> str:
        self._ids.append(token)
        return self._flush(whole=True)

    def finish(self) -> str:
        """What was held back: at most an incomplete character, as a replacement character."""
        return self._flush(whole=False)

    def _flush(self, whole: bool) -> str:
        before = self._text.decode(self._ids[self._context : self._read])
        now = self._text.decode(self._ids[self._context :])
        if whole and (now.endswith(_BROKEN) or len(now) <= len(before)):
            return ""
        self._context, self._read = self._read, len(self._ids)
        return now[len(before) :]


class StopStrings:
    """Ends a text before the first of some strings, which may be spread over many pieces.

    `feed` gives out only what cannot be the beginning of a stop string; `hit` says that one was found, and
    nothing comes after.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Raises UsageError for an empty string, which would stop before anything."""
        if any(not stop for stop in stops):
            raise UsageError("a stop string is empty", hint="leave --stop out to stop at the model's own end")
        self._stops = tuple(stops)
        self._held = ""
        self.hit: str | None = None

    def feed(self, piece: str) -> str:
        if self.hit:
            return ""
        self._held += piece
        found = [(self._held.find(stop), stop) for stop in self._stops if stop in self._held]
        if found:
            at, self.hit = min(found)
            given, self._held = self._held[:at], ""
            return given
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        given, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return given

    def finish(self) -> str:
        """What was held back and turned out not to be a stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
