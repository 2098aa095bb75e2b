"""Escapes untrusted names of files, classes, data sets, stores and checkpoints for display.

A terminal obeys control characters, rich reads markup, matplotlib reads mathtext, a spreadsheet runs formulas. HTML
pages escape all of their text (kamim/reporting/page.py).
"""

import re

_FORMULA = re.compile(r"'*[=+\-@]")  # the start of a formula in a spreadsheet, or of one that is quoted already
_LONG_WORD = re.compile(r"\S{501,}")
LONG_LINE = 4_000  # characters
_MARKDOWN = re.compile(r"[\\|<]|(?<=\])\(")  # an escape, the end of a cell, a tag, and the address of a link


def printable(text: str) -> str:
    """Returns text as one line, with undecodable bytes and control and format characters escaped."""
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # a byte of a file name that is not UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def shortened(message: str) -> str:
    """Returns a message without the middle of words of more than 500 characters, and of more than LONG_LINE.

    A message quotes what a file holds, such as a name of a million characters.
    """
    return _ends(_LONG_WORD.sub(lambda word: _ends(word[0], 200), message), LONG_LINE)


def _ends(text: str, limit: int) -> str:
    """Returns text, or `limit` characters of both its ends if it is longer."""
    return text if len(text) <= limit else f"{text[: limit // 2]}...{text[-(limit // 2) :]}"


def one_line(error: object) -> str:
    """Returns the message of an error as printable text, shortened, with line breaks as spaces."""
    return printable(shortened(" ".join(str(error).split())))


def literal(text: str) -> str:
    """Returns a matplotlib title or label that shows `text`: without mathtext, and never hidden from a legend."""
    shown = printable(text).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def markdown(text: str) -> str:
    """Returns text as one line of Markdown, in which it is neither HTML nor a link and ends no cell of a table."""
    return _MARKDOWN.sub(r"\\\g<0>", printable(text))


def cell(text: str) -> str:
    """Returns a CSV cell that spreadsheets show but do not compute. `text_of` is its inverse."""
    return f"'{text}" if _FORMULA.match(text) else text


def text_of(cell: str) -> str:
    """Returns the text that `cell` was called with."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell
