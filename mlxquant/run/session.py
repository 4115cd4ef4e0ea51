"""A conversation that costs prefill only for what is new.

Each turn the whole conversation is rendered through the model's template, as it would be for a fresh start.
What the cache already holds of that is kept, the rest of the cache is cut off, and only the new end is fed.
Where a cache cannot be cut (recurrent states, a full sliding window) it is made again, and the turn's stats
say so.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlxquant.errors import MemoryBudgetError, SourceError, TargetError, UsageError
from mlxquant.fit.cache import PREFILL_STEP
from mlxquant.run.cache import CachePlan
from mlxquant.run.generate import Generation, Stats, generate
from mlxquant.run.sampling import Sampling
from mlxquant.run.text import Message, StopStrings, Text

FORMAT = "mlxquant-chat-1"
ROLES = ("user", "assistant")
FULL_CONTEXT_HINT = "/reset forgets all; or /save it and /load it in a chat with a longer --context"


@dataclass
class Turn:
    """One answer: reused_tokens were in the cache already, stats.prompt_tokens were fed. recomputed: why
    reuse failed. dropped: stopped before its first piece, so that the question left the conversation again.
    """

    reused_tokens: int = 0
    stats: Stats = field(default_factory=Stats)
    finish: str | None = None
    recomputed: str | None = None
    dropped: bool = False


class Session:
    """`ask(text)` streams the answer. A stopped answer stays in the conversation as far as it came.

    context_tokens: when the conversation with the answer would be longer, the answer is cut; when the
    question alone fills it, MemoryBudgetError. A question stopped before its answer began is forgotten.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        text: Text,
        plan: CachePlan,
        *,
        sampling: Sampling | None = None,
        system: str | None = None,
        max_tokens: int | None = None,
        context_tokens: int | None = None,
        prefill_step: int = PREFILL_STEP,
        stops: Sequence[str] = (),
    ) -> None:
        self.messages: list[Message] = []
        self.turns: list[Turn] = []
        self.system, self.sampling, self.max_tokens = system, sampling or Sampling(), max_tokens
        self._model, self._text, self._plan = model, text, plan
        self.context_tokens, self._prefill_step, self._stops = context_tokens, prefill_step, tuple(stops)
        self._answered: tuple[str, list[int]] = (
            "",
            [],
        )  # as rendered and answered, and its exact tokens
        self._cache: list[Any] = plan.make()
        self._fed: list[int] = []  # the tokens in the cache

    def ask(
        self,
        message: str,
        *,
        on_progress: Callable[[int, int], None] | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> Generator[str, None, None]:
        """Adds a user message and yields the pieces of the answer. Closing the iterator early is a stop, too."""
        self.messages.append({"role": "user", "content": message})
        try:
            prompt, ids = self._prompt()
            room = self._room(len(ids))
        except Exception:
            self.messages.pop()  # a refused question is not part of the conversation
            raise
        turn = self._reuse(ids)
        self.turns.append(turn)
        run = generate(
            self._model, ids[turn.reused_tokens :], self._cache, self.sampling, max_tokens=room,
            eos_ids=self._text.eos_ids, prefill_step=self._prefill_step, history=ids[: turn.reused_tokens],
            on_progress=on_progress, stop=stop,
        )  # fmt: skip
        turn.stats = run.stats
        yield from self._answer(run, turn, prompt, ids)

    def _answer(self, run: Generation, turn: Turn, prompt: str, ids: list[int]) -> Generator[str, None, None]:
        stream, stops = self._text.stream(), StopStrings(self._stops)
        pieces: list[str] = []
        answer: list[int] = []
        try:
            for token in run:
                answer.append(token.id)
                if piece := stops.feed(stream.feed(token.id)):
                    pieces.append(piece)
                    yield piece
                if stops.hit:
                    break
            if rest := stops.feed(stream.finish()) + stops.finish():
                pieces.append(rest)
                yield rest
        finally:
            run.close()
            turn.finish = "stop string" if stops.hit else run.finish
            if turn.finish == "length" and len(answer) != self.max_tokens:
                turn.finish = "full context"
            self._fed += run.fed
            if not run.intact:
                self._empty_cache()
            turn.dropped = turn.finish == "stopped" and not pieces
            if turn.dropped:
                self.messages.pop()
            else:
                self._close_turn("".join(pieces), answer, prompt, ids)

    def _close_turn(self, said: str, answer: list[int], prompt: str, ids: list[int]) -> None:
        self.messages.append({"role": "assistant", "content": said})
        # Said exactly what the tokens say: the next turn goes on from them instead of tokenizing the text
        # again.
        exact = said == self._text.decode(answer)
        self._answered = (prompt + said, [*ids, *answer]) if exact else ("", [])

    def _prompt(self) -> tuple[str, list[int]]:
        """The rendered conversation and its tokens.

        A model may spell a word in tokens other than the tokenizer would. Where the rendered text goes on
        from what was answered, the answer's own tokens are kept, and the cache with them; only the rest is
        tokenized. (Its beginning is a special token in chat templates, so no token can span the seam.)
        """
        system = [{"role": "system", "content": self.system}] if self.system else []
        prompt = self._text.render([*system, *self.messages])
        before, ids = self._answered
        if before and prompt.startswith(before):
            return prompt, [*ids, *self._text.encode(prompt[len(before) :], special=False)]
        return prompt, self._text.encode(prompt)

    def _room(self, prompt_tokens: int) -> int | None:
        """How many tokens the answer may have."""
        if self.context_tokens is None:
            return self.max_tokens
        left = self.context_tokens - prompt_tokens
        if left < 1:
            raise MemoryBudgetError(
                f"with this question the conversation has {prompt_tokens} tokens, the context {self.context_tokens}",
                hint=FULL_CONTEXT_HINT,
            )
        return min(left, self.max_tokens) if self.max_tokens else left

    def _reuse(self, ids: list[int]) -> Turn:
        """Cuts the cache to what it has in common with `ids`; at least the last token is always fed again."""
        common = common_prefix(self._fed, ids[:-1])
        surplus = len(self._fed) - common
        if surplus and not self._cut(surplus):
            reason = f"{surplus} tokens had to leave a cache that cannot be cut, so all were computed again"
            self._empty_cache()
            return Turn(recomputed=reason)
        self._fed = self._fed[:common]
        return Turn(reused_tokens=common)

    def _cut(self, count: int) -> bool:
        from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

        if count == len(self._fed):
            self._empty_cache()
            return True
        return bool(can_trim_prompt_cache(self._cache)) and trim_prompt_cache(self._cache, count) == count

    def _empty_cache(self) -> None:
        self._cache = self._plan.make()
        self._fed = []

    @property
    def model_name(self) -> str:
        return self._text.name

    @property
    def cached_tokens(self) -> int:
        return len(self._fed)

    @property
    def cache_bytes(self) -> int:
        """Allocated now."""
        return sum(0 if entry.empty() else entry.nbytes for entry in self._cache)

    def reset(self) -> None:
        """Forgets the conversation, not the system prompt."""
        self.messages, self.turns = [], []
        self._answered = ("", [])
        self._empty_cache()

    def save(self, path: Path) -> None:
        """Messages and settings as JSON; the cache is not saved but computed again. Raises TargetError."""
        content = {
            "format": FORMAT,
            "model": self._text.name,
            "system": self.system,
            "messages": self.messages,
        }
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        try:
            # What is no character (a piped byte that was no UTF-8) is written as JSON's own escape.
            path.write_bytes(text.encode("utf-8", "backslashreplace"))
        except OSError as error:
            raise TargetError(f"{path}: cannot be written ({error.strerror})") from error

    def load(self, path: Path) -> str | None:
        """Takes over a saved conversation; its tokens are fed with the next question. Returns the name of the
        model it was held with. Raises SourceError, and leaves this conversation as it is."""
        content = _read(path)
        self.reset()
        self.system = content.get("system")
        self.messages = [{"role": m["role"], "content": m["content"]} for m in content["messages"]]
        return str(content["model"]) if content.get("model") else None

    def set_system(self, text: str | None) -> None:
        """A new system prompt, from the next question on; it changes the beginning, so all is computed again
        then.
        """
        self.system = text or None


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of leading tokens that two sequences share."""
    for i, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return i
    return min(len(first), len(second))


def _read(path: Path) -> dict[str, Any]:
    """A saved conversation, checked. Raises SourceError naming the file and what is wrong."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path}: is not JSON", hint="load a file that /save wrote") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise SourceError(f"{path}: is no saved chat", hint="load a file that /save wrote")
    system, messages = content.get("system"), content.get("messages")
    if not (system is None or isinstance(system, str)) or not isinstance(messages, list):
        raise SourceError(f"{path}: has no list of messages", hint="load a file that /save wrote")
    for i, message in enumerate(messages):
        wanted = ROLES[i % 2]
        if (
            not isinstance(message, dict)
            or message.get("role") != wanted
            or not isinstance(message.get("content"), str)
        ):
            raise SourceError(
                f"{path}: message {i + 1} is not text from the {wanted}", hint="user and assistant take turns"
            )
    if len(messages) % 2:
        raise SourceError(f"{path}: its last question has no answer", hint="user and assistant take turns")
    return content


def require_template(text: Text) -> None:
    """Raises UsageError or UnsupportedError early, before the weights are read."""
    if not text.render([{"role": "user", "content": "Hello"}]):
        raise UsageError(
            f"{text.name}: its chat template renders nothing", hint="use `mlxquant generate --no-template`"
        )
