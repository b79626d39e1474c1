"""What only a GPU can show. One JSON file, written anew after every figure, so that an interrupted run loses nothing.

    python benchmarks/on_gpu.py --part correctness          # about 3 minutes on one GPU
    python benchmarks/on_gpu.py --part speed                # about 4 minutes
    python benchmarks/on_gpu.py --part evidence --data bccd # about 8 minutes; without --data, synthetic shapes
    python benchmarks/on_gpu.py --part correctness --cpu    # a dry run on the CPU, of any part

The parts need torch, torchvision, transformers, timm, accelerate, datasets, pycocotools and this
repository, and no network. `--wheels FOLDER` installs the last two packages from the wheels of a folder.

Exit status 1: a check that ran has failed. A check that cannot run here is named with the reason and counts as neither.
"""

import argparse
import datetime
import itertools
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

UPDATES = 4
LOSS_TOLERANCE = {"float32": 1e-3, "bf16": 0.1, "fp16": 0.1}  # relative, of a mean loss over updates, against the CPU
# The scaler of float16 begins at 65536 and skips updates until gradients are finite: losses of the first are compared,
# and so many are made that the scale has found its place.
UPDATES_OF_FP16 = 16
FAMILIES = ("gfl", "faster_rcnn", "deformable_detr")


LAUNCHED = """
import json, sys
from pathlib import Path

import torch.distributed

from tests.tiny_run import losses, make_trainer

trainer = make_trainer(Path(sys.argv[1]), max_steps={updates}, use_cpu={use_cpu})
trainer.train()
print("FIGURES", json.dumps([losses(trainer), torch.distributed.get_backend()]))
"""


class NotHere(Exception):
    """A check that cannot run on this machine; the message says why."""


class Report:
    """Figures by name, on the disk after each of them."""

    def __init__(self, path: Path, part: str, seconds: float, device: str):
        self.path, self.end = path, time.monotonic() + seconds
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        self.content: dict[str, Any] = {
            "part": part,
            "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU, {platform.processor()}",
            "commit": commit.stdout.strip() or "unknown",
            "date": datetime.date.today().isoformat(),
            "torch": torch.__version__,
            "checks": {},
        }

    def run(self, name: str, check: Callable[[], dict[str, Any]]) -> None:
        """Run a check and keep its figures; `ok` says whether it passed, None that it could not run here."""
        if self.over:
            figures: dict[str, Any] = {"ok": None, "reason": "the time given by --seconds was over"}
        else:
            start = time.monotonic()
            try:
                figures = check()
            except NotHere as reason:
                figures = {"ok": None, "reason": str(reason)}
            except Exception as error:  # whatever fails, the other checks still run
                figures = {"ok": False, "error": f"{type(error).__name__}: {error}"[:2000]}
            figures["seconds"] = round(time.monotonic() - start, 1)
        self.content["checks"][name] = figures
        self.path.write_text(json.dumps(self.content, indent=1) + "\n")
        print({True: "ok  ", False: "FAIL", None: "-   "}[figures["ok"]], name, json.dumps(figures), flush=True)

    @property
    def over(self) -> bool:
        """Whether the time is over, so that nothing is begun."""
        return time.monotonic() > self.end

    @property
    def failed(self) -> list[str]:
        """Names of the checks that ran and did not pass."""
        return [name for name, figures in self.content["checks"].items() if figures["ok"] is False]


# ------------------------------------------------------------------------------------------------------ correctness


def golden_case(path: Path, device: str) -> dict[str, Any]:
    """The authors' figures of a training step, computed on the device in float32 without TF32."""
    from tests.parity.figures import figure_error
    from tests.parity.steps import compare, kind_of, tolerance

    case = json.loads(path.read_text())
    torch.set_default_device(device)
    try:
        pairs, _ = compare(case)
    finally:
        torch.set_default_device(None)
    largest: dict[str, float] = {}
    wrong = []
    for name, pair in pairs.items():
        error = figure_error(name, pair)
        largest[kind_of(name)] = max(error, largest.get(kind_of(name), 0.0))
        if not error <= tolerance(name):
            wrong.append(name)
    found: dict[str, Any] = {"figures": len(pairs), "largest_errors": largest, "wrong": wrong[:5]}
    if device != "cpu" and case["student"]["architecture"] == "deformable_detr":
        found["encoder_memory_of_pixels"] = errors = memory_errors(case, device)
        if max(errors.values()) <= tolerance("encoder_memory"):
            wrong = [name for name in wrong if not name.split(".")[1].startswith("encoder_memory")]
    return {"ok": not wrong, **found}


def memory_errors(case: dict[str, Any], device: str) -> dict[str, float]:
    """Largest relative difference of an encoder's memory between the CPU and the device, in rows of pixels.

    The position embedding of padding is the sine of some three million radians, whose last bits are the device's. The
    figures of a case count rows of padding too, which no pixel attends to.
    """
    from tests.parity import parity_detr

    memories: dict[str, list[torch.Tensor]] = {"student": [], "teacher": []}
    masks: list[torch.Tensor] = []
    for kind in ("cpu", device):
        with torch.device(kind), torch.no_grad():
            inputs, _ = parity_detr.batch(case)
            for role, found in memories.items():
                model = parity_detr.build(case, role).eval()
                model.model.encoder.register_forward_pre_hook(
                    lambda module, args, words: masks.append(words["attention_mask"].bool().cpu()), with_kwargs=True
                )
                found.append(model(**inputs).encoder_last_hidden_state.cpu())
    return {
        role: float((ours - theirs)[masks[0]].abs().max() / ours[masks[0]].abs().mean())
        for role, (ours, theirs) in memories.items()
    }


def trained(folder: Path, device: str, family: str, updates: int = UPDATES, **changes: Any) -> dict[str, Any]:
    """Losses, AP and weights of a short run of the real trainer on tiny models."""
    from tests.tiny_run import losses, make_trainer

    trainer = make_trainer(folder, family=family, use_cpu=device == "cpu", max_steps=updates, **changes)
    trainer.train()
    metrics = trainer.evaluate()
    return {"trainer": trainer, "losses": losses(trainer), "map": metrics["eval_map"]}


def mean_losses(run: dict[str, Any], updates: int) -> dict[str, float]:
    """Each loss part's mean over the first updates."""
    names = [name for name in run["losses"][0] if name != "grad_norm"]
    return {name: sum(entry[name] for entry in run["losses"][:updates]) / updates for name in names}


def precision(folder: Path, device: str, family: str, kind: str) -> dict[str, Any]:
    """Losses of the trainer on the device in a precision, against float32 on the CPU."""
    if kind == "fp16" and device == "cpu":
        raise NotHere("float16 with its gradient scaler needs CUDA")
    flags = {} if kind == "float32" else {kind: True}
    compared, updates = (1, UPDATES_OF_FP16) if kind == "fp16" else (UPDATES, UPDATES)
    reference = mean_losses(trained(folder, "cpu", family), compared)
    run = trained(folder, device, family, updates, **flags)
    got = mean_losses(run, compared)
    scale = max(abs(value) for value in reference.values())
    errors = {name: abs(got[name] - value) / max(abs(value), 0.01 * scale) for name, value in reference.items()}
    figures: dict[str, Any] = {"worst_loss": max(errors, key=errors.__getitem__), "error": max(errors.values())}
    scaler = run["trainer"].accelerator.scaler
    if scaler is not None:
        figures["gradient_scale"] = scaler.get_scale()
        figures["skipped"] = skipped = round(math.log2(scaler._init_scale / scaler.get_scale()))
        figures["of"] = updates
    settled = scaler is None or skipped <= updates / 2
    figures["ok"] = figures["error"] <= LOSS_TOLERANCE[kind] and run["map"] >= 0 and settled
    return figures


def guard(folder: Path, device: str, kind: str) -> dict[str, Any]:
    """A NaN in a batch stops a run, and is skipped and counted where that is asked for; weights stay finite."""
    if kind == "fp16" and device == "cpu":
        raise NotHere("float16 with its gradient scaler needs CUDA")
    from crosskd_hf.training.guard import NonFiniteLossError
    from tests.tiny_run import make_trainer

    flags = {} if kind == "float32" else {kind: True}
    outcome: dict[str, Any] = {}
    for nonfinite in ("stop", "skip"):
        trainer = make_trainer(folder, use_cpu=device == "cpu", max_steps=UPDATES, nonfinite=nonfinite, **flags)
        collate, calls = trainer.data_collator, []

        def poisoned(examples: Any, collate: Any = collate, calls: list[int] = calls) -> Any:
            batch = collate(examples)
            calls.append(1)
            if len(calls) == 2:
                batch["pixel_values"] = batch["pixel_values"] * float("nan")
            return batch

        trainer.data_collator = poisoned
        try:
            trainer.train()
            outcome[nonfinite] = "ran through"
        except NonFiniteLossError:
            outcome[nonfinite] = "stopped"
        outcome[f"{nonfinite}_finite"] = all(bool(p.isfinite().all()) for p in trainer.model.parameters())
        outcome[f"{nonfinite}_skipped"] = trainer._guard.skipped
    right = {"stop": "stopped", "skip": "ran through", "stop_finite": True, "skip_finite": True, "skip_skipped": 1}
    return {"ok": all(outcome[name] == value for name, value in right.items()), **outcome}


def resume(folder: Path, device: str) -> dict[str, Any]:
    """4 updates against 2, a checkpoint and 2 more: the largest difference of a weight."""
    from tests.tiny_run import make_trainer

    options: dict[str, Any] = {
        "use_cpu": device == "cpu",
        "max_steps": UPDATES,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    whole = make_trainer(folder, **options)
    whole.train()
    again = make_trainer(folder, **options)
    again.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-2"))
    pairs = zip(whole.model.parameters(), again.model.parameters(), strict=True)
    largest = max(float((a - b).detach().abs().max()) for a, b in pairs)
    return {"ok": largest <= (0.0 if device == "cpu" else 1e-4), "largest_difference": largest}


def one_process(folder: Path, device: str) -> dict[str, Any]:
    """A launched process (NCCL on a GPU, gloo on the CPU) against none."""
    baseline = trained(folder, device, "gfl")
    (folder / "launched.py").write_text(LAUNCHED.format(updates=UPDATES, use_cpu=device == "cpu"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command += [str(folder / "launched.py"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    lines = [line for line in done.stdout.splitlines() if line.startswith("FIGURES ")]
    if not lines:
        return {"ok": False, "error": done.stderr[-1500:]}
    launched, backend = json.loads(lines[0].removeprefix("FIGURES "))
    difference = max(
        abs(one[name] - other[name]) / max(abs(one[name]), 1e-3)
        for one, other in zip(baseline["losses"], launched, strict=True)
        for name in one
    )
    expected = "nccl" if device == "cuda" else "gloo"
    return {"ok": difference < 1e-3 and expected in backend, "backend": backend, "largest_difference": difference}


def correctness(report: Report, device: str, data: str | None) -> None:
    """The checks, the most important first; `data` is not read."""
    with tempfile.TemporaryDirectory() as name:
        numbers = itertools.count()

        def fresh() -> Path:
            folder = Path(name) / str(next(numbers))
            folder.mkdir()
            return folder

        for path in sorted((ROOT / "tests" / "golden").glob("*.json")):
            report.run(f"golden/{path.stem}", lambda path=path: golden_case(path, device))
        for kind in LOSS_TOLERANCE:
            for family in FAMILIES:
                report.run(f"trainer/{family}/{kind}", lambda f=family, k=kind: precision(fresh(), device, f, k))
            report.run(f"guard/{kind}", lambda k=kind: guard(fresh(), device, k))
        report.run("resume", lambda: resume(fresh(), device))
        report.run("one_process", lambda: one_process(fresh(), device))


def speed(report: Report, device: str, data: str | None) -> None:
    """See `gpu_speed.py`."""
    from benchmarks.gpu_speed import speed as measure

    torch.backends.cudnn.allow_tf32 = True  # as torch begins
    measure(report, device, data)


def evidence(report: Report, device: str, data: str | None) -> None:
    """See `gpu_evidence.py`."""
    from benchmarks.gpu_evidence import evidence as measure

    measure(report, device, data)


PARTS = {"correctness": (correctness, 600.0), "speed": (speed, 240.0), "evidence": (evidence, 480.0)}


def main() -> int:
    """Run a part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--cpu", action="store_true", help="a dry run on the CPU")
    parser.add_argument("--seconds", type=float, help="start no check after this many seconds")
    parser.add_argument("--out", type=Path, help="JSON file (default: on_gpu_PART.json)")
    parser.add_argument("--data", help="data set in COCO's format for the part evidence (default: synthetic shapes)")
    parser.add_argument("--wheels", type=Path, help="folder of wheels that are missing here (datasets, pycocotools)")
    options = parser.parse_args()
    device = "cpu" if options.cpu else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is visible; --cpu is a dry run on the CPU")
    if options.data and options.part != "evidence":
        parser.error(f"--data has no effect on the part {options.part}")
    if options.wheels:
        install = [sys.executable, "-m", "pip", "install", "--no-index", "--find-links", str(options.wheels)]
        subprocess.run([*install, "datasets", "pycocotools"], check=True)
    if device == "cpu":
        torch.set_num_threads(1)  # the models are tiny: two threads would wait for each other
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    run, seconds = PARTS[options.part]
    report = Report(
        options.out or Path(f"on_gpu_{options.part}.json"), options.part, options.seconds or seconds, device
    )
    run(report, device, options.data)
    print(f"{len(report.failed)} checks failed: {', '.join(report.failed)}" if report.failed else "no check failed")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
