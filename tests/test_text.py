"""Names and texts of others, as terminals and pages show them."""

from __future__ import annotations

import os

import pytest

from tokenflow.text import printable, printable_lines


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("Füße & 犬\u3000の動画.mp4", "Füße & 犬\u3000の動画.mp4"),
        (os.fsdecode(b"caf\xe9.mp4"), r"caf\xe9.mp4"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("two\nlines\tand\rmore", r"two\nlines\tand\rmore"),
        ("\x9b2J\x7f", r"\x9b2J\x7f"),  # one byte begins a sequence, too
        ("\u202egpj.4pm", r"\u202egpj.4pm"),  # would turn what follows
        ("a\u2028b\ud800", r"a\u2028b\ud800"),
    ],
)
def test_what_has_no_glyph_is_escaped(name: str, shown: str) -> None:
    assert printable(name) == shown
    shown.encode()  # which a terminal's encoding asks for


def test_lines_stay_lines() -> None:
    assert printable_lines("a\n\tb\x1bc") == "a\n\tb\\x1bc"
