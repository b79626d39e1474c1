"""Draws the packages and who imports whom, from the code: `python docs/house.py` writes docs/house.svg.

Rows are the layers of `pyproject.toml`. An arrow goes from a package to one that it imports; what follows from other
arrows is left out, and so are arrows inside of a row and helpers that belong to no row (`text`, `files`).
"""

from __future__ import annotations

import ast
import html
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "crosskd_hf"
WIDTH, ROW, BOX_WIDTH, BOX_HEIGHT = 960, 142, 220, 94

Edges = set[tuple[str, str]]


def layers() -> list[list[str]]:
    """The packages by the rows of the first import contract, the command line on top."""
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'containers = \["crosskd_hf"\]\nlayers = (\[.*?\n\])', settings, re.DOTALL)
    assert found is not None
    return [re.findall(r"\w+", row) for row in ast.literal_eval(found[1])]


def debts() -> Edges:
    """Imports against the layers that the contract still allows."""
    lines = re.findall(r'"crosskd_hf\.(\w+)\S* -> crosskd_hf\.(\w+)', (ROOT / "pyproject.toml").read_text())
    return set(lines)


def imports() -> Edges:
    """(importing, imported) for all packages and modules directly below `crosskd_hf`."""
    edges: Edges = set()
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        edges |= {(parts[0], name) for name in _imported(path, parts) if name != parts[0]}
    return edges


def _imported(path: Path, parts: tuple[str, ...]) -> Iterator[str]:
    """Packages below `crosskd_hf` that a module imports anywhere."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom):
            continue
        names = (node.module or "").split(".") if node.module else []
        if node.level:
            names = [*parts[: len(parts) - node.level], *names]
        elif names[:1] == ["crosskd_hf"]:
            names = names[1:]
        else:
            continue
        yield from names[:1] or [alias.name for alias in node.names]


def essential(edges: Edges) -> Edges:
    """Without the edges that follow from others; `edges` have no cycle."""
    reach = {start: {end for begin, end in edges if begin == start} for start, _ in edges}
    for _ in reach:
        for start, ends in reach.items():
            reach[start] = ends.union(*(reach.get(end, set()) for end in ends))
    implied = {(start, end) for start, via in edges for end in reach.get(via, ())}
    return edges - implied


def purpose(name: str) -> str:
    """The first sentence of a package's docstring."""
    path = PACKAGE / name / "__init__.py" if (PACKAGE / name).is_dir() else PACKAGE / f"{name}.py"
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return re.split(r"\.(?:\s|$)", text)[0].replace("`", "")


def picture() -> str:
    """The whole SVG."""
    row_of = {name: number for number, row in enumerate(layers()) for name in row}
    known = {edge for edge in imports() - debts() if set(edge) <= set(row_of)}
    edges = essential({edge for edge in known if row_of[edge[0]] < row_of[edge[1]]})
    rows = _ordered(layers(), edges)
    places = {
        name: (int(WIDTH * (column + 0.5) / len(row)), 20 + ROW * number)
        for number, row in enumerate(rows)
        for column, name in enumerate(row)
    }
    body = [_arrow(*places[start], *places[end]) for start, end in sorted(edges)]
    body += [_box(name, *place) for name, place in places.items()]
    height = ROW * len(rows)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif">',
            f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
            '<defs><marker id="tip" markerWidth="9" markerHeight="9" refX="8" refY="4" orient="auto">'
            '<path d="M0,0 L9,4 L0,8 z" fill="#57606a"/></marker></defs>',
            *body,
            "</svg>\n",
        ]
    )


def _ordered(rows: list[list[str]], edges: Edges) -> list[list[str]]:
    """Packages whose arrows pass a row come to the outside, so that the arrows pass no box."""
    number = {name: index for index, row in enumerate(rows) for name in row}
    passing = {name for edge in edges if abs(number[edge[0]] - number[edge[1]]) > 1 for name in edge}
    ordered = []
    for row in rows:
        outer = [name for name in row if name in passing]
        ordered.append([*outer[::2], *(name for name in row if name not in passing), *outer[1::2]])
    return ordered


def _arrow(x: int, y: int, to_x: int, to_y: int) -> str:
    lean = max(-90, min(90, (to_x - x) // 4))  # leave and arrive on the side that faces the other box
    ends = f'x1="{x + lean}" y1="{y + BOX_HEIGHT}" x2="{to_x - lean}" y2="{to_y - 2}"'
    return f'<line {ends} stroke="#57606a" stroke-width="1.5" marker-end="url(#tip)"/>'


def _box(name: str, x: int, y: int) -> str:
    left = x - BOX_WIDTH // 2
    sizes = f'width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="6" fill="#eef4fb" stroke="#4a7ab5"'
    lines = [f'<rect x="{left}" y="{y}" {sizes}/>', _text(name, x, y + 20, 'font-size="15" font-weight="bold"')]
    for number, line in enumerate(textwrap.wrap(purpose(name), 34)):
        lines.append(_text(line, x, y + 38 + 15 * number, 'font-size="11.5"'))
    return "\n".join(lines)


def _text(text: str, x: int, y: int, font: str) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="middle" {font} fill="#1b2b3f">{html.escape(text)}</text>'


if __name__ == "__main__":
    (ROOT / "docs" / "house.svg").write_text(picture(), encoding="utf-8")
