"""Tables of text, for Markdown and spreadsheets. kamim.reporting.page.table shows one on a page."""

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

from kamim.storage import escape

_NUMBER = re.compile(r"-?\d+(\.\d+)?")


@dataclass(frozen=True)
class Table:
    """Rows of text below a header."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """Returns the table in Markdown. Text of a cell is neither HTML nor a link."""
        lines = [self.header, tuple("---" for _ in self.header), *self.rows]
        return "".join(f"| {' | '.join(map(escape.markdown, cells))} |\n" for cells in lines)

    def csv(self) -> str:
        """Returns the table as CSV. Spreadsheets compute no cell; decimal numbers stay numbers."""
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerows([_csv(cell) for cell in cells] for cells in (self.header, *self.rows))
        return stream.getvalue()


def of_columns(columns: Sequence[tuple[str, Sequence[str]]]) -> Table:
    """Returns the table of columns (title, cells), without those that are empty in every row."""
    kept = [(title, cells) for title, cells in columns if any(cells)]
    return Table(tuple(title for title, _ in kept), tuple(zip(*(cells for _, cells in kept), strict=True)))


def _csv(cell: str) -> str:
    text = escape.printable(cell)
    return text if _NUMBER.fullmatch(text) else escape.cell(text)
