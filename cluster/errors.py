"""The errors that several rooms raise or answer."""

from typing import Any


class ContextLengthError(ValueError):
    """A prompt, or what is to come after it, has no room in the context."""


class EngineDeadError(RuntimeError):
    """The engine has failed or was shut down; the message and `__cause__` say why."""


class WorkerDiedError(RuntimeError):
    """A rank has died, failed or hung, and its group was torn down.

    Attributes:
        rank: the rank that was the cause.
        log_file: where it logged, on its node.
    """

    def __init__(self, message: str, rank: int = -1, log_file: str | None = None) -> None:
        super().__init__(message)
        self.rank = rank
        self.log_file = log_file

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (*self.args, self.rank, self.log_file)
