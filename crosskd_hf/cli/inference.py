"""`crosskd-hf evaluate`, `predict` and `cost`: models at work."""

import argparse
import sys
from pathlib import Path
from typing import Any

from ..text import one_line, strict_json
from .command import Add, Commands, add_command, print_paths
from .data_options import add_data, add_split, chosen_split, data_source, how_to_read


def _add_evaluate(commands: Commands, name: str, text: str) -> None:
    parser = add_command(
        commands,
        name,
        _evaluate,
        text,
        "examples: crosskd-hf evaluate student-folder photos/ --split test\n"
        "          crosskd-hf evaluate student-folder instances_val.json val/",
    )
    parser.add_argument("model", help="folder or Hub id")
    add_data(parser)
    add_split(parser)
    parser.add_argument("--batch-size", type=int, default=8, help="images at once (default: 8)")
    parser.add_argument("--workers", type=int, default=0, help="processes that read images (default: 0)")
    _add_speed(parser)
    parser.add_argument(
        "--max-detections", "--max_detections", type=int,
        help="so many of an image are evaluated; above 100 also of each class (default: the processor's; 100)",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, help="also write the metrics, in [0, 1], to this file; null: no truth")


def _add_predict(commands: Commands, name: str, text: str) -> None:
    parser = add_command(
        commands,
        name,
        _predict,
        text,
        "examples: crosskd-hf predict student-folder photos/ --out found/\n"
        "          crosskd-hf predict student-folder 'photos/**/*.jpg' clip.mp4 --format coco csv",
    )
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument(
        "source", nargs="+", help="images, videos, folders, patterns such as 'photos/*.jpg', or addresses (https://...)"
    )
    parser.add_argument("--out", type=Path, default=Path("predictions"), help="folder to write (default: predictions)")
    parser.add_argument("--threshold", type=float, default=0.5, help="lowest score to report (default: 0.5)")
    _add_speed(parser)
    parser.add_argument(
        "--format", nargs="+", default=[], metavar="FORMAT",
        help="also write the boxes as coco (coco.json), yolo (labels/ and data.yaml) or csv (boxes.csv)",
    )  # fmt: skip
    parser.add_argument(
        "--nms", type=float, nargs="+", default=[], metavar="IOU",
        help="instead, show every image at several NMS thresholds side by side: nms.png and nms.csv",
    )  # fmt: skip
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: the first GPU, if there is one)")


def _add_speed(parser: argparse.ArgumentParser) -> None:
    """How a model runs, for commands that run one."""
    parser.add_argument("--fast", action="store_true", help="bf16 autocast and channels_last, as the device gains")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--channels-last", "--channels_last", action="store_true", help="weights channels last")


def _add_cost(commands: Commands, name: str, text: str) -> None:
    example = "example: crosskd-hf cost gfl:resnet18 gfl:resnet50 student-folder"
    parser = add_command(commands, name, _cost, text, example)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="folder, Hub id, ARCHITECTURE:BACKBONE or preset")
    parser.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="px (default: 800 1280)")
    parser.add_argument(
        "--device", help="where speed is measured (default: the first GPU, if there is one, or the CPU)"
    )
    parser.add_argument("--no-speed", action="store_true", help="only count, which takes seconds")


def _speed(arguments: argparse.Namespace) -> dict[str, bool]:
    return {name: getattr(arguments, name) for name in ("bf16", "channels_last", "fast")}


def _evaluate(arguments: argparse.Namespace) -> int:
    from ..data.loading import load_detection_dataset
    from ..inference.evaluation import evaluate, evaluate_data, table
    from ..inference.loading import load_detector

    if arguments.json is not None:
        _demand_writable(arguments.json)
    source, names = data_source(arguments), ("batch_size", "workers", "max_detections")
    options = {**_speed(arguments), **{name: getattr(arguments, name) for name in names}}
    if source:
        splits = load_detection_dataset(source, **how_to_read(arguments))
        name, data = chosen_split(splits, arguments.split)
        print(f"{splits.source}, split {name}", *(f"  {note}" for note in splits.notes), sep="\n")
        metrics = evaluate_data(*load_detector(arguments.model), data, **options)
    elif arguments.split is not None:
        raise ValueError("--split has no effect beside a COCO json and its image folder.")
    else:
        metrics = evaluate(*load_detector(arguments.model), arguments.path, arguments.images, **options)
    print(table(metrics))
    if arguments.json is not None:
        arguments.json.write_text(strict_json(metrics, indent=2) + "\n")
    return 0


def _demand_writable(path: Path) -> None:
    """Find out before hours of evaluation whether its result can be written; folders that are missing are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a"):
        pass
    if is_new:
        path.unlink()


def _predict(arguments: argparse.Namespace) -> int:
    from ..inference.detection import to_device
    from ..inference.files import open_sources
    from ..inference.loading import load_detector
    from ..inference.predict import predict_to_folder

    if not 0 <= arguments.threshold <= 1:
        raise ValueError(f"--threshold {arguments.threshold} must lie in [0, 1].")
    out, threshold = arguments.out, arguments.threshold
    with open_sources(arguments.source, without=out) as files:
        model, processor = load_detector(arguments.model)
        model = to_device(model, arguments.device)
        if arguments.nms:
            return _side_by_side(model, processor, files, arguments)
        records = predict_to_folder(model, processor, files, out, threshold, arguments.format, **_speed(arguments))
    failed = [record for record in records if "error" in record]
    for record in failed:
        print(f"error: {one_line(record['file'])}: {one_line(record['error'], None)}", file=sys.stderr)
    count = sum(len(record["detections"]) for record in records if "detections" in record)
    skipped = f"; {files.skipped}" if files.skipped else ""
    if not count and len(failed) < len(records):
        highest = max(record.get("highest_score", 0.0) for record in records)
        print(f"nothing above {threshold:g}, the highest score was {highest:.2f}: see --threshold")
    frames = sum("frame" in record for record in records)
    counts = {"images": len(records) - len(failed) - frames, "frames": frames}
    seen = " and ".join(f"{number} {name}" for name, number in counts.items() if number) or "0 images"
    print(f"{count} objects in {seen}, written to {out}{skipped}")
    return 1 if failed else 0


def _side_by_side(model: Any, processor: Any, files: Any, arguments: argparse.Namespace) -> int:
    """Pictures of several NMS thresholds instead of predictions."""
    from ..analysis.nms import side_by_side
    from ..create import Detector

    if arguments.format:
        raise ValueError("--format has no effect beside --nms, which writes nms.csv.")
    detector = Detector(model, processor)
    return print_paths(side_by_side(detector, files, arguments.out, arguments.nms, arguments.threshold))


def _cost(arguments: argparse.Namespace) -> int:
    import torch

    from ..experiments.cost import SIZE, measure, table

    size = SIZE if arguments.size is None else (arguments.size[0], arguments.size[1])
    device = None if arguments.no_speed else arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    print(table([measure(model, size, device) for model in arguments.models], size, device))
    return 0


ADD: dict[str, Add] = {"evaluate": _add_evaluate, "predict": _add_predict, "cost": _add_cost}
