"""One error tree. What a user can cause is drawn as one line (and one hint) at the top; the rest is our bug.

MlxquantError                    exit code 1
|-- UsageError                   exit code 2: the command line asks for something that does not exist
|-- SourceError                  what was given cannot be read: a header of lies, a missing shard
|   `-- UnsupportedError         it can be read, but its family, scheme or tensor is not one we know
|-- PlanError                    it can be read, but what was asked of it cannot be done
|-- TargetError                  the output cannot be written: exists, read-only, disk full
|-- VerifyError                  what was written is not what was planned
|-- MemoryBudgetError            the run would not fit this machine
`-- HubError                     the Hub said no, or could not be reached
"""


class MlxquantError(Exception):
    """A failure the user can act on.

    `message` is one line: the file or tensor, what was found, what was expected. `hint` is the next step.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(MlxquantError):
    exit_code = 2


class SourceError(MlxquantError):
    pass


class UnsupportedError(SourceError):
    pass


class PlanError(MlxquantError):
    pass


class TargetError(MlxquantError):
    pass


class VerifyError(MlxquantError):
    pass


class MemoryBudgetError(MlxquantError):
    pass


class HubError(MlxquantError):
    pass
