"""What the client raises, said as one HubError: what happened, and what to do about it.

The client's own messages run over several lines and name URLs and request ids; the token is in none of ours.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mlxquant.errors import HubError

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

FULL = (errno.ENOSPC, errno.EDQUOT)
UNWRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)
MAKE_ROOM = "make room (`hf cache prune` or `hf cache rm`), or set HF_HOME to a folder on a larger disk"


class Unreachable(HubError):
    """No answer, or none that is about this repo: a complete copy in the cache may stand in."""


def transport_error() -> Any:
    """The root error of the client's HTTP library, httpx in 1.x and httpx2 since: connection, timeout ..."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__bases__[0]


@contextmanager
def told_as_hub_errors(repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Turns what `huggingface_hub` raises inside the block into HubError; our own errors pass."""
    from huggingface_hub.errors import HFValidationError

    try:
        yield
    except (transport_error(), OSError, HFValidationError) as error:
        raise explain(error, repo_id, revision) from error


def explain(error: BaseException, repo_id: str, revision: str | None) -> HubError:
    """One HubError for one failure of the client. The innermost cause that we know tells the story."""
    from huggingface_hub import errors

    chain = _causes(error)
    for cause in chain:
        if isinstance(cause, errors.HfHubHTTPError):
            return _refused(cause, repo_id, revision)
        if isinstance(cause, errors.HFValidationError):
            return HubError(f"{repo_id!r} is no Hub repo id", hint="write it like org/name")
        if isinstance(cause, errors.OfflineModeIsEnabled):
            return Unreachable(f"{repo_id}: offline mode is on (HF_HUB_OFFLINE)", hint="unset HF_HUB_OFFLINE")
        if isinstance(cause, OSError) and cause.errno in FULL:
            return HubError(f"the disk is full while pulling {repo_id}", hint=MAKE_ROOM)
        if isinstance(cause, OSError) and cause.errno in UNWRITABLE:
            message = f"the Hub cache cannot be written: {cause.strerror} ({cause.filename})"
            return HubError(message, hint="set HF_HOME to a folder you can write")
    if "Consistency check failed" in str(error):
        return HubError(f"a file of {repo_id} arrived with the wrong size", hint="run the same command again")
    reason = next((str(e).splitlines()[0] for e in reversed(chain) if str(e)), type(chain[-1]).__name__)
    hint = "check the network and run the same command again"
    return Unreachable(f"{endpoint()} cannot be reached for {repo_id}: {reason}", hint=hint)


def _refused(error: HfHubHTTPError, repo_id: str, revision: str | None) -> HubError:
    """The Hub answered, and the answer was no."""
    from huggingface_hub import errors

    status, page = error.response.status_code, f"{endpoint()}/{repo_id}"
    if isinstance(error, errors.GatedRepoError):
        then = ", then log in with `hf auth login`" if status == 401 else " with the account of your token"
        return HubError(f"{repo_id} is gated: its licence must be accepted first", hint=f"accept it at {page}{then}")
    anonymous = status == 401 and "authorization" not in error.response.request.headers
    if isinstance(error, errors.RepositoryNotFoundError) or anonymous:  # strangers are told no more
        hint = "check the spelling; for a private repo log in with `hf auth login`"
        return HubError(f"{repo_id} is not on {endpoint()}, or is private", hint=hint)
    if isinstance(error, errors.RevisionNotFoundError):
        return HubError(f"{repo_id} has no revision {revision or 'main'!r}", hint=f"see {page}/commits/main")
    if isinstance(error, errors.RemoteEntryNotFoundError):
        name = error.response.url.path.rpartition("/")[2]
        return HubError(f"{repo_id} lists {name}, but does not hold it", hint="try another revision")
    if status in (401, 403):
        hint = "log in again with `hf auth login`; HF_TOKEN wins over the saved token"
        return HubError(f"{endpoint()} does not let this token read {repo_id} ({status})", hint=hint)
    if status == 429 or status >= 500:
        what = "asks for fewer requests" if status == 429 else "is in trouble"
        wait = error.response.headers.get("Retry-After", "")
        hint = f"wait {wait} s and run it again" if wait.isdigit() else "wait a little and run it again"
        return Unreachable(f"{endpoint()} {what} ({status})", hint=hint)
    return HubError(f"{endpoint()} answered {status} for {repo_id}", hint=f"see {page}")


def _causes(error: BaseException) -> list[BaseException]:
    """The error and what it was raised from, outermost first."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    return chain


def endpoint() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT)
