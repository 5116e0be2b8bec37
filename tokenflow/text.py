"""Names and texts of others, for terminals and pages: nothing in them is obeyed."""

from __future__ import annotations

import unicodedata


def printable(name: object) -> str:
    """A name on one line: bytes that are no UTF-8, and whatever has no glyph, escaped.

    So control characters, line breaks, terminals' escape sequences and marks that turn the
    direction of writing are seen, not obeyed.

    >>> printable("caf\\udce9\\x1b[2J")  # as os.fsdecode gives b"caf\\xe9\\x1b[2J"
    'caf\\\\xe9\\\\x1b[2J'
    """
    text = str(name)
    return text if text.isprintable() else "".join(map(escaped, text))


def printable_lines(text: object) -> str:
    """A text of several lines, each as `printable` gives it; tabs stay, too."""
    lines = ("\t".join(map(printable, line.split("\t"))) for line in str(text).split("\n"))
    return "\n".join(lines)


def escaped(character: str) -> str:
    """The character itself if it has a glyph or is a space, else its escape in Python's form."""
    if character.isprintable() or unicodedata.category(character) == "Zs":
        return character
    if "\udc80" <= character <= "\udcff":  # how Python tells a byte that is no UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()
