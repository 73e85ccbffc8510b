"""Sizes and durations as people write them: 4.5 GB, 1 min 20 s. One way to write each."""

_SIZES = ("bytes", "kB", "MB", "GB", "TB", "PB")


class Count(int):
    """A number of things, which fairseq's progress bars print in all its digits: 1245184.

    Of any other number they print six: 1.24518e+06.
    """

    def __format__(self, spec: str) -> str:
        return format(int(self), "d" if spec == "g" else spec)


def in_bytes(size: float) -> str:
    """A size in powers of 1,000, as disks are sold.

    Args:
        size (float): bytes, >= 0.

    Returns:
        str: up to three digits and a unit, such as ``512 bytes``, ``4.5 GB`` or ``211 GB``.
    """
    if size == 1:
        return "1 byte"
    value, unit = float(size), 0
    # What would be rounded to 1,000 of a unit is 1.0 of the next.
    while unit + 1 < len(_SIZES) and round(value) >= 1000:
        value, unit = value / 1000, unit + 1
    digits = 1 if unit and value < 99.95 else 0
    return f"{value:,.{digits}f} {_SIZES[unit]}"


def in_time(seconds: float) -> str:
    """A duration in its two largest units.

    Args:
        seconds (float): >= 0.

    Returns:
        str: such as ``0.4 s``, ``47 s``, ``1 min 20 s``, ``2 h 5 min`` or ``3 days 4 h``.
    """
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if round(seconds) < 60:
        return f"{seconds:.0f} s"
    if round(seconds) < 3600:
        return _two(round(seconds), 60, "min", "s")
    if round(seconds / 60) < 24 * 60:
        return _two(round(seconds / 60), 60, "h", "min")
    hours = round(seconds / 3600)
    return _two(hours, 24, "day" if hours < 48 else "days", "h")


def _two(count: int, size: int, large: str, small: str) -> str:
    """*count* of the small unit, of which *size* make a large one."""
    whole, rest = divmod(count, size)
    return f"{whole:,} {large}" + (f" {rest} {small}" if rest else "")
