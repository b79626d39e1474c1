"""The table of what still differs from the published experiments is the one of the code, and short."""

from pathlib import Path

from crosskd_hf.experiments.differences import REMAINING, differences_table

PAGE = Path(__file__).parents[2] / "docs" / "reproduce.md"


def test_the_page_has_the_table_of_the_code() -> None:
    assert differences_table() in PAGE.read_text(encoding="utf-8")


def test_it_is_short_and_every_row_is_complete() -> None:
    assert 0 < len(REMAINING) <= 15
    assert all(all(cell.strip() for cell in row) for row in REMAINING.values())
