"""The notebook runs where it lies, from the first cell to the last one, in small."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.page_runner import ROOT

NOTEBOOK = ROOT / "examples" / "from_images_to_student.ipynb"
SMALL = {"IMAGES": 8, "SIZE": 64, "EPOCHS": 1}
# A teacher of one epoch finds nothing, which stops the run.
ANY_TEACHER = "import crosskd_hf.experiments.distill as _d\n_d._ap_of_teacher = lambda comparison: 0.5"


def read(path: Path) -> Any:
    nbformat = pytest.importorskip("nbformat")
    return nbformat.read(path, as_version=4)


def test_it_is_kept_without_outputs() -> None:
    notebook = read(NOTEBOOK)
    assert [cell for cell in notebook.cells if cell.get("outputs") or cell.get("execution_count")] == []


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_it_runs(tmp_path: Path) -> None:
    nbclient = pytest.importorskip("nbclient")
    notebook = read(shutil.copy(NOTEBOOK, tmp_path))
    (settings,) = (cell for cell in notebook.cells if cell.source.startswith("IMAGES ="))
    for name, value in SMALL.items():
        settings.source, replaced = re.subn(rf"^{name} = \d+", f"{name} = {value}", settings.source, flags=re.MULTILINE)
        assert replaced == 1
    settings.source += f"\n{ANY_TEACHER}"
    nbclient.NotebookClient(notebook, timeout=250, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    printed = "".join(output.get("text", "") for output in shown)
    assert "Undecided" in printed or "Distillation " in printed
    assert len([output for output in shown if "image/png" in output.get("data", {})]) == 3
    assert not [output for output in shown if output.output_type == "error"]
    assert (tmp_path / "notebook_run" / "run" / "distilled" / "model.safetensors").is_file()
