"""Names of others reach terminal, card and json as text and as nothing else."""

from __future__ import annotations

import io
import json
import sys

import pytest

from crosskd_hf.text import code_span, escape_on_output, lines, markdown, one_line, strict_json

EVIL = [
    "\x1b[31m\x1b]0;owned\x07red",
    "two\nlines\r\u2028three\x85",
    "\u202egnp.exe",
    "\ud800",
    "\x9b31m",
    "tab\tnul\0",
]
FINE = ["Käse", "собака", "猫", "می\u200cخواهم", "कि\u200dट", "a b", "✔ 🐈", ""]


class TestOneLine:
    @pytest.mark.parametrize("name", EVIL)
    def test_what_is_not_printable_is_escaped(self, name: str) -> None:
        assert one_line(name).isprintable()
        assert "\\" in one_line(name)

    @pytest.mark.parametrize("name", FINE)
    def test_every_script_stays(self, name: str) -> None:
        assert one_line(name) == name

    def test_it_is_cut(self) -> None:
        assert one_line("x" * 300) == "x" * 200 + "..."
        assert one_line("x" * 300, None) == "x" * 300

    def test_several_lines(self) -> None:
        assert lines("a\x1b\n" + "b" * 300) == "a\\x1b\n" + "b" * 300


class TestMarkdown:
    @pytest.mark.parametrize(
        ("text", "shown"),
        [
            ("<img src=x onerror=alert(1)>", "&#60;img src=x onerror=alert(1)&#62;"),
            ("a\n\n# heading", "a\\n\\n\\# heading".replace("\\n", "&#92;n")),
            ("a|b`c`", "a\\|b\\`c\\`"),
            ("[x](javascript:1) ![y](z)", "\\[x\\](javascript:1) \\!\\[y\\](z)"),
            ("*b* __u__ ~~s~~", "\\*b\\* \\_\\_u\\_\\_ \\~\\~s\\~\\~"),
            ("&lt;b&#62;", "&#38;lt;b&#38;\\#62;"),
            ("$$x$$ \\(y\\)", "&#36;&#36;x&#36;&#36; &#92;(y&#92;)"),
            ("https://a.b www.c.d", "https&#8203;://a.b www&#8203;.c.d"),
            ("gfl-r18, COCO 2017 (val)", "gfl-r18, COCO 2017 (val)"),
        ],
    )
    def test_nothing_in_it_has_an_effect(self, text: str, shown: str) -> None:
        assert markdown(text) == shown

    def test_code_spans_cannot_be_left(self) -> None:
        assert code_span("a`b``c\n<x>") == "`a'b''c\\n<x>`"


class TestStrictJson:
    def test_what_is_not_finite_is_null(self) -> None:
        content = {"a": float("nan"), "b": [1.5, float("inf")], "c": {"d": -float("inf"), "e": "NaN"}, "f": (1, None)}

        def refuse(token: str) -> None:
            raise AssertionError(token)

        read = json.loads(strict_json(content, indent=2), parse_constant=refuse)
        assert read == {"a": None, "b": [1.5, None], "c": {"d": None, "e": "NaN"}, "f": [1, None]}


def test_a_terminal_that_lacks_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    escape_on_output()
    sys.stdout.write("Käse \ud800 猫")
    sys.stdout.flush()
    assert written.getvalue() == b"K\\xe4se \\ud800 \\u732b"
