"""Numbers as people read them at a glance: short, with their unit, never cut."""

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def count(number: float) -> str:
    """`17`, `9,999`, `12.3k`, `4.6M`: at most six characters."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(number) >= size:
            unit = 1e3 if suffix == "k" else size
            return f"{number / unit:.1f}{suffix}"
    return f"{number:,.0f}" if number >= 10 or number == int(number) else f"{number:.1f}"


def size(num_bytes: float) -> str:
    """`512 B`, `1.5 MiB`."""
    unit = 0
    while num_bytes >= 1024 and unit < len(_UNITS) - 1:
        num_bytes, unit = num_bytes / 1024, unit + 1
    return f"{num_bytes:.0f} {_UNITS[unit]}" if unit == 0 else f"{num_bytes:.1f} {_UNITS[unit]}"


def share(part: float, whole: float) -> str:
    """`12.5%`; `-` of nothing."""
    return f"{part / whole:.1%}" if whole else "-"


def span(seconds: float) -> str:
    """`42 s`, `3 min`, `5 h 10 min`, `2 d 3 h`."""
    seconds = max(seconds, 0)
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = int(seconds // 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h"
