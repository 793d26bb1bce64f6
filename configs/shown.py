"""Values in error messages."""


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
