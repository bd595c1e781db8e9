"""A table for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Aligned lines: the first and the last columns to the left, all else to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    last = len(header) - 1

    def line(cells: Sequence[str]) -> str:
        aligned = [
            cell.ljust(width) if i in (0, last) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(aligned).rstrip()

    yield line(header)
    yield "-" * min(120, sum(widths) + 2 * last)
    yield from map(line, rows)
