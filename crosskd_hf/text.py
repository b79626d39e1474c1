"""Text of others, such as class and file names, made fit for a terminal, for Markdown and for strict JSON."""

from __future__ import annotations

import json
import math
import re
import sys
from typing import Any

_MOST_CHARACTERS = 200
_JOINERS = "\u200c\u200d"  # unseen, but part of the spelling of Persian, Hindi and others
_MARKUP = re.compile(r"[&<>\\$`*_#\[\]!|~]")
_BY_NUMBER = "&<>\\$"  # tags, entities and the Hub's formulas; a backslash makes the others plain


def one_line(text: str, most: int | None = _MOST_CHARACTERS) -> str:
    """`text` on one line of a terminal: what isn't printable is escaped, what exceeds `most` characters is cut.

    Control characters, line breaks, marks that turn the direction of writing and lone surrogates become `\\x1b` and the
    like; letters of all scripts stay.
    """
    if most is not None and len(text) > most:
        text = f"{text[:most]}..."
    return text if text.isprintable() else "".join(map(_escaped, text))


def lines(text: str) -> str:
    """As `one_line` for a text of several lines, such as a report: its line breaks stay, and nothing is cut."""
    return "\n".join(one_line(line, None) for line in text.split("\n"))


def markdown(text: str) -> str:
    """`text` on one line of a Markdown page, to be read as it is: neither HTML nor Markdown in it has an effect."""
    text = _MARKUP.sub(_plain, one_line(text))
    return re.sub(r"(?i)\b(www|https?|ftp|mailto)\b", r"\1&#8203;", text)  # addresses become no links


def code_span(text: str) -> str:
    """`text` in a code span of a Markdown page, on one line."""
    return f"`{one_line(text).replace('`', chr(39))}`"


def strict_json(content: Any, **options: Any) -> str:
    """`content` as JSON that every parser takes: numbers that aren't finite become null."""
    return json.dumps(_finite(content), allow_nan=False, **options)


def escape_on_output() -> None:
    """Let what is printed be escaped where the terminal's encoding lacks a character, instead of stopping there."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _escaped(character: str) -> str:
    if character.isprintable() or character in _JOINERS:
        return character
    return character.encode("unicode_escape").decode("ascii")


def _plain(match: re.Match[str]) -> str:
    character = match[0]
    return f"&#{ord(character)};" if character in _BY_NUMBER else f"\\{character}"


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
