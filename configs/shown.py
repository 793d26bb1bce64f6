"""Values in error messages, and what may have been meant by some of them."""

import math


def shown(value: object) -> str:
    """A value as errors show it: short, whatever it is."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    try:
        text = repr(value)
    except RecursionError:
        return f"a {type(value).__name__} that is nested too deep"
    except ValueError:  # an integer of thousands of digits in it
        return f"a {type(value).__name__} with a huge integer"
    return text if len(text) <= 80 else f"{text[:77]}..."


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
