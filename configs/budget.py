"""How users write a budget, and what they may have meant by something else."""

import math

from .shown import shown


def budget_mistake(value: object) -> str:
    """An error message for a budget that is neither tokens nor a share."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (OverflowError, TypeError, ValueError):
        number = math.nan
    if 0 < number < 1:
        return (
            f"budget: {value} is no number of tokens; a share is written with a percent sign: "
            f"'{100 * number:g}%'"
        )
    return f"budget: must be tokens or a share such as '25%', not {shown(value)}"
