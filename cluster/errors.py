"""The errors that several rooms raise or answer."""

from typing import Any, Literal

# How a worker was lost: its process ended; it raised; it lives, but its step does not end; nothing
# is heard of it, which is also how a stopped process and a lost node look.
Cause = Literal["died", "failed", "hung", "unreachable"]


class ContextLengthError(ValueError):
    """A prompt, or what is to come after it, has no room in the context."""


class ConversationBusyError(ValueError):
    """A conversation has a turn that has not ended: its next one can go on from its end alone."""


class EngineDeadError(RuntimeError):
    """The engine has failed or was shut down; the message and `__cause__` say why."""


class ControllerLostError(EngineDeadError):
    """The process that held the engine has died or cannot be reached; another can be started."""


class WorkerDiedError(RuntimeError):
    """A rank has died, failed or hung, and its group was torn down.

    Attributes:
        rank: the rank that was the cause.
        log_file: where it logged, on its node.
        cause: how it was lost.
    """

    def __init__(
        self,
        message: str,
        rank: int = -1,
        log_file: str | None = None,
        cause: Cause = "died",
    ) -> None:
        super().__init__(message)
        self.rank = rank
        self.log_file = log_file
        self.cause: Cause = cause

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (*self.args, self.rank, self.log_file, self.cause)


class NotRecoverableError(RuntimeError):
    """Lost workers cannot be started again; the message says why."""
