"""Progress bars, and packages that are needed for some purposes only."""

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def bar(
    wanted: bool | None, name: str, total: int | None, unit: str, extra: str, done: int = 0
) -> Iterator[Callable[[int], Any]]:
    """A progress bar, or nothing: gives the function to call with the number of new units.

    None: where there is a terminal, and tqdm.
    """
    if wanted is None:
        wanted = sys.stderr is not None and sys.stderr.isatty() and importlib.util.find_spec("tqdm") is not None
    if wanted:
        tqdm = require("tqdm", "the progress bar (progress=False leaves it out)", extra).tqdm
        with tqdm(desc=name, initial=done, total=total, unit=f" {unit}", unit_scale=True, smoothing=0.1) as shown:
            yield shown.update
    else:
        yield lambda count: None


def require(name: str, purpose: str, extra: str) -> Any:
    """An optional package, or an error that says how to get it."""
    try:
        return __import__(name)
    except ImportError as error:
        raise ImportError(f'{name} is not installed; {purpose} needs it: pip install "relprop[{extra}]".') from error
