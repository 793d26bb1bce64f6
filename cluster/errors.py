"""The error of an engine that has lost a rank."""

from typing import Any


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
