"""How much code does one CrossKD step run through? Prints JSON: files and lines of this package.

    python benchmarks/step_files.py

A file counts with all its lines if one of its functions runs. A GFL student learns from a GFL teacher.

- `functions`: of these lines, those of the functions that run, docstrings included.
- `files`, `lines`: the whole of `CrossKDTrainer.compute_loss`: both detectors' forward passes, the student's loss on
  its labels, the bookkeeping over processes, and the distillation.
- `distillation`: the distiller's call alone, without the teacher's forward pass, which is a detector's like any other.
  `own` is the code of `crosskd_hf.distillation` (distiller, view, method, distances): what a reader of CrossKD opens.
  `called` is the detector's code below: the finishing half of the head, box coder, assignment and loss functions.
- `opened`: the files with their lines, those of the distillation first.

Takes 10 seconds on the CPU.
"""

import inspect
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import crosskd_hf
from crosskd_hf import CrossKDConfig, CrossKDTrainer
from crosskd_hf.models import DetectionImageProcessor
from tests.tiny_dense import make_batch, make_detector

PACKAGE = Path(crosskd_hf.__file__).resolve().parent
Lines = dict[str, int]
Functions = set[CodeType]


@contextmanager
def opened(apart: tuple[Any, ...] = ()) -> Iterator[tuple[Lines, Functions]]:
    """Collects the package's files of which a function runs, with their lines, and these functions.

    Args:
        apart: Code objects; what runs below a call of one of them is not counted.
    """
    found: Lines = {}
    functions: Functions = set()
    below = 0

    def look(frame: FrameType, event: str, _: Any) -> None:
        nonlocal below
        if frame.f_code in apart and event in ("call", "return"):
            below += 1 if event == "call" else -1
        path = Path(frame.f_code.co_filename)
        if event == "call" and not below and PACKAGE in path.parents:
            name = path.relative_to(PACKAGE.parent).as_posix()
            found[name] = found.get(name) or len(path.read_text().splitlines())
            functions.add(frame.f_code)

    sys.setprofile(look)
    try:
        yield found, functions
    finally:
        sys.setprofile(None)


def trainer(folder: str) -> CrossKDTrainer:
    """A student and a teacher of different seeds, as small as they get."""
    return CrossKDTrainer(
        model=make_detector("gfl", seed=0).train(),
        args=CrossKDConfig(folder, methods=["crosskd"], use_cpu=True, report_to="none"),
        processing_class=DetectionImageProcessor(),
        teacher_model=make_detector("gfl", seed=1),
    )


def measure(step: Callable[[], Any], *apart: Any) -> tuple[Lines, int]:
    """Files of a second call, and the lines of its functions: what is computed once and kept is not of every step."""
    step()
    with opened(tuple(apart)) as (files, functions):
        step()
    # comprehensions and the like are lines of the function around them
    lines = [len(inspect.getsourcelines(each)[0]) for each in functions if not each.co_name.startswith("<")]
    return files, sum(lines)


def without(files: Lines, others: Lines) -> Lines:
    """`files` but the `others`."""
    return {name: lines for name, lines in files.items() if name not in others}


def total(files: Lines) -> dict[str, int]:
    """How many files, and their lines."""
    return {"files": len(files), "lines": sum(files.values())}


def main() -> None:
    """Measure one step, and its distillation."""
    with tempfile.TemporaryDirectory() as folder:
        trained = trainer(folder)
        distiller, inputs = trained.distiller, make_batch()
        assert distiller is not None
        whole, functions = measure(lambda: trained.compute_loss(trained.model, inputs))
        outputs = trained.model(**inputs, **distiller.student_request)
        part, _ = measure(lambda: distiller(outputs, inputs), type(distiller.teacher).forward.__code__)
    own = {name: lines for name, lines in part.items() if name.startswith("crosskd_hf/distillation/")}
    called, rest = without(part, own), without(whole, part)
    figures = {
        **total(whole),
        "functions": functions,
        "distillation": {"own": total(own), "called": total(called)},
        "opened": {name: lines for group in (own, called, rest) for name, lines in sorted(group.items())},
    }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
