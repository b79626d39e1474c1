"""Do two commits compute the same distillation? Losses and gradients of all pairs of detectors, on seeded weights.

    python benchmarks/compare_commits.py 342f49a HEAD

Each commit is unpacked into a folder of its own and runs every pair through the classes that its trainer uses: GFL,
RetinaNet, FCOS and ATSS each from each, Faster R-CNN, all DETR families, PKD between families; by CrossKD, plain KD,
PKD and their sums. Terms of a loss are compared by their names (`cls`, `reg`, ...; methods and decoder layers added
up), the student's own loss where the detector is ours, and the gradient norm of each parameter. The tolerances are
relative: 1e-6 for losses, 1e-4 for gradients. Pairs that a commit refuses are named. Exit status 1 if something
differs.

Takes 3 minutes on one core. The first commit may be from before methods were objects (`make_distiller`).
"""

import argparse
import importlib.util
import io
import itertools
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
HEADS = ("gfl", "retinanet", "fcos", "atss")
METHODS = (("crosskd",), ("kd",), ("pkd",), ("crosskd", "pkd"), ("crosskd", "kd", "pkd"))
ACROSS = (("gfl", "faster_rcnn"), ("faster_rcnn", "retinanet"), ("gfl", "deformable_detr"), ("rt_detr", "gfl"))
LOSSES, GRADIENTS = 1e-6, 1e-4
OLD_TERMS = {"loss_cls_kd": "cls", "loss_reg_kd": "reg", "loss_iou_kd": "iou", "loss_centerness_kd": "centerness"}
OLD_TERMS["loss_feat_kd"] = "features"
TINY = {"backbone": "test_resnet", "num_labels": 5, "fpn_channels": 16}
DENSE = {"head_channels": 16}
REGIONS = {"rpn_channels": 16, "roi_size": 3, "fc_channels": 24, "anchor_scale": 4.0, "train_proposals": 60}
Figures = dict[str, Any]


# ---- In each commit's own process ----


def zoo() -> ModuleType:
    """The tiny DETR-type models; they are transformers' own, and the same for both commits."""
    path = ROOT / "tests" / "distillation" / "detr_zoo.py"
    spec = importlib.util.spec_from_file_location("detr_zoo", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(kind: str, seed: int, width: int = 16) -> Any:
    """A tiny model with weights that depend on their names and the seed alone."""
    from crosskd_hf import models

    if kind in (*HEADS, "faster_rcnn"):
        config_class = next(c for c in models.DETECTORS if c.model_type == f"crosskd_{kind}")
        own = REGIONS if kind == "faster_rcnn" else DENSE | {"norm_groups": None if kind == "retinanet" else 4}
        config = config_class(**TINY | own | {"fpn_channels": width})
        if kind == "faster_rcnn":
            config.rpn_samples = config.roi_samples = None  # all of them: nothing is drawn
        model = models.DETECTORS[config_class](config)
        seed_weights(model, seed)
        return model
    return zoo().build(kind, seed)  # drawn from the seed in the same order, by transformers


def seed_weights(module: Any, seed: int, by_shape: bool = False) -> None:
    """Draw every weight by its name, or by its shape where the two commits have different names."""
    import torch

    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if not tensor.is_floating_point() or not tensor.numel():
                continue
            text = str(tuple(tensor.shape)) if by_shape else name
            drawn = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(zlib.crc32(text.encode()) + seed))
            if tensor.ndim > 1:
                tensor.copy_(drawn * (1.5 / tensor[0].numel()) ** 0.5)
            elif name.endswith("running_var"):
                tensor.copy_(1 + 0.1 * drawn.abs())
            else:
                tensor.copy_(0.1 * drawn + float(name.endswith("weight")))


def distiller_of(student: Any, teacher: Any, methods: tuple[str, ...]) -> Any:
    """By this commit's own classes; the adapters are seeded."""
    from crosskd_hf import distillation

    if hasattr(distillation, "make_distiller"):
        made = distillation.make_distiller(student, teacher, distillation.DistillationConfig(methods=methods))
    else:
        made = distillation.Distiller(student, teacher, list(methods))
    seed_weights(made, 3, by_shape=True)
    return made


def term_of(key: str) -> str:
    """cls, reg, iou, centerness or features, from either commit's key."""
    return key.rpartition("/")[2] if "/" in key else OLD_TERMS[key.rpartition(".")[2]]


def figures(student: Any, teacher: Any, methods: tuple[str, ...]) -> Figures:
    """Terms of the distillation, the student's own loss, and the distillation's gradient norm of each parameter."""
    import torch

    from crosskd_hf.models.losses import divide

    batch = zoo().batch
    torch.manual_seed(5)
    inputs = batch()
    distiller = distiller_of(student, teacher, methods)
    torch.manual_seed(6)
    outputs = student.train()(**inputs, **distiller.student_request)
    losses = divide(distiller(outputs, inputs))
    terms: dict[str, float] = {}
    for key, loss in losses.items():
        terms[term_of(key)] = terms.get(term_of(key), 0.0) + loss.item()
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    total = torch.stack(list(losses.values())).sum()
    gradients = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
    if type(student).__module__.startswith("crosskd_hf."):
        terms["own loss"] = outputs.loss.item()
    norms = {name: 0.0 if g is None else g.double().norm().item() for name, g in zip(trained, gradients, strict=True)}
    return {"losses": terms | {"total": total.item()}, "gradients": norms}


def runs() -> Iterator[tuple[str, tuple[str, str], tuple[str, ...], int]]:
    """Name, kinds of student and teacher, methods, and the student's width."""
    pairs = [*itertools.product(HEADS, HEADS), ("faster_rcnn",) * 2, *((name,) * 2 for name in zoo().MODELS)]
    for pair, methods in itertools.product(pairs, METHODS):
        if pair[0] in (*HEADS, "faster_rcnn") or methods in METHODS[::2]:
            yield f"{pair[0]} from {pair[1]}: {' + '.join(methods)}", pair, methods, 16
    for pair in ACROSS:
        yield f"{pair[0]} from {pair[1]}: pkd", pair, ("pkd",), 16
    for kind in (*HEADS, "faster_rcnn"):
        for methods in (("crosskd",), ("pkd",)):
            yield f"narrow {kind} from {kind}: {methods[0]}", (kind, kind), methods, 8


def compute() -> dict[str, Figures]:
    """All runs of this commit; of those that it refuses, the reason."""
    found: dict[str, Figures] = {}
    for name, (student, teacher), methods, width in runs():
        try:
            found[name] = figures(build(student, 1, width).train(), build(teacher, 2).eval(), methods)
        except (ValueError, NotImplementedError) as error:
            found[name] = {"refused": str(error)}
    return found


# ---- Beside one another ----


def unpack(commit: str, folder: Path) -> None:
    """The files of a commit."""
    archive = subprocess.check_output(["git", "archive", commit, "crosskd_hf"], cwd=ROOT)
    with tarfile.open(fileobj=io.BytesIO(archive)) as content:
        content.extractall(folder, filter="data")


def of_commit(commit: str) -> dict[str, Figures]:
    """Figures of a commit, from a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        unpack(commit, Path(folder))
        command = [sys.executable, "-W", "ignore", str(Path(__file__).resolve()), "--compute"]
        environment = os.environ | {"PYTHONPATH": folder}
        printed = subprocess.check_output(command, cwd=folder, env=environment, text=True)
    return json.loads(printed.splitlines()[-1])  # type: ignore[no-any-return]


def error(old: dict[str, float], new: dict[str, float], scale: float | None = None) -> float:
    """The largest difference of two dicts, relative to the figure, or to `scale`; infinite if their keys differ."""
    if old.keys() != new.keys():
        return float("inf")
    pairs = [(value, new[key]) for key, value in old.items()]
    return max((abs(a - b) / (scale or max(abs(a), 1e-6)) for a, b in pairs), default=0.0)


def report(old: dict[str, Figures], new: dict[str, Figures]) -> bool:
    """Print what differs and the largest errors. Returns whether nothing does."""
    worst, agree, compared = {"losses": 0.0, "gradients": 0.0}, True, 0
    for name, expected in old.items():
        got = new[name]
        if "refused" in expected or "refused" in got:
            both = "refused" in expected and "refused" in got
            reason = (got if "refused" in got else expected)["refused"]
            print(f"refused by {'both' if both else 'one'}: {name}: {reason}")
            agree &= both
            continue
        compared += 1
        scale = max(expected["gradients"].values())
        errors = {
            "losses": error(expected["losses"], got["losses"]),
            "gradients": error(expected["gradients"], got["gradients"], scale),
        }
        for key, limit in (("losses", LOSSES), ("gradients", GRADIENTS)):
            worst[key] = max(worst[key], errors[key])
            if not errors[key] <= limit:
                agree = False
                shown = f": {expected[key]} before, {got[key]} now" if key == "losses" else ""
                print(f"{name}: {key} off by {errors[key]:.1e}{shown}")
    print(f"{compared} runs: losses within {worst['losses']:.1e}, gradients within {worst['gradients']:.1e} (relative)")
    return agree


def main() -> int:
    """Compare two commits, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commits", nargs="*", help="the one before and the one after")
    parser.add_argument("--compute", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.compute:
        import torch

        torch.set_num_threads(1)
        print(json.dumps(compute()))
        return 0
    if len(arguments.commits) != 2:
        parser.error("give two commits")
    return 0 if report(*map(of_commit, arguments.commits)) else 1


if __name__ == "__main__":
    sys.exit(main())
