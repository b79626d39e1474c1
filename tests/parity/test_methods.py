"""Methods against figures of original implementations."""

import json
from pathlib import Path

import pytest

from tests.parity import methods, wording

FILES = sorted((Path(__file__).parents[1] / "golden" / "methods").glob("*__*.json"))
QUICK = [path for path in FILES if not path.stem.startswith(("crosskd", "pkd_head"))]

SLOW = [pytest.mark.slow, pytest.mark.timeout(900)]  # full-size models


def test_every_runner_has_a_file() -> None:
    assert {path.stem.partition("__")[0] for path in FILES} <= set(methods.RUNNERS)


@pytest.mark.parametrize(
    "path",
    [
        path if path in QUICK else pytest.param(path, marks=[pytest.mark.slow, pytest.mark.timeout(900)])
        for path in FILES
    ],
    ids=lambda path: path.stem,
)
def test_agrees(path: Path) -> None:
    figures = methods.compare(json.loads(path.read_text()))
    assert len(figures) > 40
    assert not [figure for figure in figures if not figure.error <= 1]


class TestComparison:
    DOCUMENT = json.loads(next(path for path in FILES if path.stem == "fitnets__normal").read_text())

    def test_a_changed_figure_is_found(self) -> None:
        document = json.loads(json.dumps(self.DOCUMENT))
        expected = document["variants"]["no adapter, 32 channels"]["expected"]
        expected["losses"]["fitnets"]["total"] *= 1.001
        wrong = [figure.path for figure in methods.compare(document) if figure.error > 1]
        assert wrong == ["no adapter, 32 channels: .losses.fitnets.total"]

    def test_what_is_not_computed_is_wrong(self) -> None:
        figures = list(methods.figures({"losses": {"a": 1.0}, "regions": [1, 2]}, {"regions": [1, 3]}))
        assert [(figure.path, figure.error) for figure in figures] == [
            (".losses.a", float("inf")),
            (".regions[0]", 0.0),
            (".regions[1]", float("inf")),
        ]

    def test_an_unknown_method_is_an_error(self) -> None:
        with pytest.raises(KeyError, match="No runner for the method 'other'"):
            methods.compare({"method": "other"})

    @pytest.mark.parametrize("field", [field for field in wording.SENTENCES if field.startswith("variants.")])
    def test_an_unknown_variant_is_an_error(self, field: str) -> None:
        path = next(path for path in FILES if f"variants.{path.stem.partition('__')[0]}" == field)
        document = json.loads(path.read_text())
        document["variants"] |= {"another": {}}
        with pytest.raises(wording.UnknownWordingError, match=f"{field}='another' is not known"):
            wording.variants(document)

    def test_the_command_prints_tolerances(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", ["methods", str(next(path for path in FILES if "fitnets" in path.stem))])
            with pytest.raises(SystemExit) as ended:
                methods.main()
        assert ended.value.code == 0
        out = capsys.readouterr().out
        assert "tolerances: losses 0.0001 relative" in out
        assert "all files agree" in out
