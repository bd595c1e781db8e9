"""What holds for every call inside ``with options(...)``: bars shown or not, checks made or not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torchlinop.errors import OptionError

_PROGRESS: ContextVar[bool | None] = ContextVar("progress", default=None)
_CHECKS: ContextVar[bool] = ContextVar("checks", default=True)


@contextmanager
def options(*, progress: bool | None = None, checks: bool | None = None) -> Iterator[None]:
    """Options of all calls inside, also of those that are made by other people's code.

    Options left out stay as they are; contexts may be nested, and ``@options(...)`` decorates a
    function. They hold in the thread, or asyncio task, that entered the context.

    Args:
        progress: False hides all bars. True shows one for every run, whether it was asked for and
            whether the output is a terminal or not. By default a run shows one if it is called
            with ``progress=True`` and the output is a terminal.
        checks: False leaves out what an operator of data that are read again for every product
            (``pin_data=False``) does first: two passes over the data, to see that they are the
            same both times, and two more of the batches alone where their order matters. Worth it
            where one has passed and many operators of the same data follow. No other check costs
            a pass over the data, so that all others are always made. True makes them again.

    Raises:
        OptionError: a value is neither True nor False.

    Example:
        >>> from torchlinop import MatrixOperator, options, trace
        >>> A = MatrixOperator(torch.eye(3))
        >>> with options(progress=False):
        ...     trace(A, progress=True).estimate  # no bar, also on a terminal
        3.0
    """
    for name, value in {"progress": progress, "checks": checks}.items():
        if not (value is None or isinstance(value, bool)):
            raise OptionError(f"expected {name} to be True or False, got {value!r}; leave it out")
    shown = _PROGRESS.set(_PROGRESS.get() if progress is None else progress)
    checked = _CHECKS.set(_CHECKS.get() if checks is None else checks)
    try:
        yield
    finally:
        _PROGRESS.reset(shown)
        _CHECKS.reset(checked)


def hidden(progress: bool) -> bool | None:
    """Whether to hide a bar that was asked for, or not; None where the output is no terminal."""
    forced = _PROGRESS.get()
    if forced is not None:
        return not forced
    return None if progress else True


def checks_wanted() -> bool:
    """Whether checks that cost passes over the data are to be made."""
    return _CHECKS.get()
