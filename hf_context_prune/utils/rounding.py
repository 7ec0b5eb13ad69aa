"""Rounding of figures that are stored."""


def six_digits(value: float) -> float:
    """Return a number rounded to six significant digits, which keeps stored files short."""
    return float(f"{value:.6g}")
