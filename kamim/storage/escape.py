"""Names from outside, safe to show: others choose what files, classes, data sets, stores and checkpoints are called.

A terminal obeys control characters, rich reads markup, matplotlib reads mathtext, a spreadsheet runs formulas. HTML
pages escape all of their text (kamim/reporting/page.py).
"""

import re

_FORMULA = re.compile(r"'*[=+\-@]")  # with what a spreadsheet takes for a formula, and with what marks that it is none


def printable(text: str) -> str:
    """One line that any terminal and any file can hold: undecodable bytes, control and format characters escaped."""
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # a byte of a file's name that is no UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def one_line(error: object) -> str:
    """The message of an error as printable text, line breaks as spaces."""
    return printable(" ".join(str(error).split()))


def literal(text: str) -> str:
    """A title or a label for matplotlib that shows `text`: no mathtext, and a legend does not leave it out."""
    shown = printable(text).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def cell(text: str) -> str:
    """A cell of a CSV file that spreadsheets show and do not compute; `text_of` undoes it."""
    return f"'{text}" if _FORMULA.match(text) else text


def text_of(cell: str) -> str:
    """What `cell` was given."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell
