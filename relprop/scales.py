"""What pictures and coloured text share: the relevance drawn in full colour, and titles."""

from collections.abc import Sequence

import numpy as np

from .errors import ArgumentError


def limits(limit: str | float, values: Sequence[np.ndarray]) -> list[float]:
    """The relevance drawn in full red, one number for each of `values`; never 0."""
    if isinstance(limit, str):
        if limit not in ("own", "shared"):
            raise ArgumentError(f'limit={limit!r} has to be "own", "shared" or a positive number.')
        own = [float(np.abs(value).max()) for value in values]
        # Relevance that is zero throughout is white on any scale; a scale of width 0 would not be one.
        return [(most if limit == "own" else max(own)) or 1.0 for most in own]
    if not (np.isfinite(limit) and limit > 0):
        raise ArgumentError(f'limit={limit!r} has to be a positive number, or "own" or "shared".')
    return [float(limit)] * len(values)


def labels(titles: str | Sequence[str] | None, count: int, several: bool, one: str, each: str) -> list[str] | None:
    """A title for each of `count` things; `one` and `each` name the thing and one of several in errors."""
    if titles is None:
        return None
    if several:
        if isinstance(titles, str) or len(titles) != count:
            raise ArgumentError(f"titles has to be {count} strings, one per {each}, not {titles!r}.")
        return list(titles)
    if not isinstance(titles, str):
        raise ArgumentError(f"titles has to be a string for one {one}, not {titles!r}.")
    return [titles]
