"""What Ray says of the end of a process or of a call, in our words."""

from ray.exceptions import ActorUnavailableError, RayTaskError

from saqqara.cluster.errors import Cause


def cause_of(error: Exception) -> Cause:
    """How a rank was lost, by the error of its call."""
    if isinstance(error, ActorUnavailableError):
        return "unreachable"
    return "failed" if isinstance(error, RayTaskError) else "died"


def one_line(error: BaseException) -> str:
    """Type and first line of an error; the rest is in its log."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def exit_reason(error: Exception) -> str:
    """The part of Ray's message that says how a process ended."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = next((text for text in lines if "exit detail" in text), lines[-1] if lines else "")
    return line.split(" Some common causes")[0] or type(error).__name__
