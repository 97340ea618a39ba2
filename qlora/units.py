"""Sizes in bytes, as constants and as users write them."""

GIB = 2**30
UNITS = {"GiB": GIB, "GB": 10**9, "MiB": 2**20, "MB": 10**6}


def parse_size(text: str) -> int:
    """`8GiB`, `7.5GB`, `6000MiB` -> bytes.

    Raises:
        ValueError: it is not a number with one of these units.
    """
    for unit, factor in UNITS.items():
        number = text.strip().removesuffix(unit)
        if number != text.strip() and number.replace(".", "", 1).strip().isdigit():
            return int(float(number) * factor)
    raise ValueError(f"{text}: expected a number with a unit, such as 8GiB, 7.5GB or 6000MiB")


def readable_size(size: float) -> str:
    """Bytes -> `13.4 GB`, or below a tenth of a GB `2.7 MB`."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
