"""`crosskd-hf convert`: checkpoints of other libraries."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from .command import Add, Commands, add_command

if TYPE_CHECKING:
    from ..convert import Conversion


def _add_convert(commands: Commands, name: str, text: str) -> None:
    sources = commands.add_parser(name, help=text, description=text).add_subparsers(metavar="SOURCE", required=True)
    mmdet = add_command(
        sources,
        "mmdet",
        _convert_mmdet,
        "GFL, ATSS, FCOS, RetinaNet, Faster R-CNN and Deformable DETR of MMDetection. The file is never executed.",
        "example: crosskd-hf convert mmdet gfl_r50_fpn_1x_coco.pth gfl-r50",
    )
    mmdet.add_argument("checkpoint", type=Path, help="the .pth file")
    mmdet.add_argument("--config", type=Path, help="MMDetection's config, if the file doesn't hold it; read as text")
    vision = add_command(
        sources,
        "torchvision",
        _convert_torchvision,
        "RetinaNet and FCOS of torchvision.",
        "example: crosskd-hf convert torchvision fcos_resnet50_fpn fcos-r50 --weights COCO_V1",
    )
    vision.add_argument("architecture", help="fcos_resnet50_fpn, retinanet_resnet50_fpn or retinanet_resnet50_fpn_v2")
    vision.add_argument("--checkpoint", type=Path, help="a .pth of the model's state dict")
    vision.add_argument("--weights", help="name of torchvision's own weights, such as COCO_V1 (downloads)")
    for source in (mmdet, vision):
        source.add_argument("folder", type=Path, metavar="OUT_DIR", help="folder to write")
        source.add_argument("--labels", help="class names: NAME,NAME,... or a file with one name a line")
        source.add_argument("--overwrite", action="store_true", help="write into a folder that is not empty")


def _convert_mmdet(arguments: argparse.Namespace) -> int:
    from ..convert import convert_mmdet_checkpoint

    labels = _labels(arguments.labels)
    return _save(convert_mmdet_checkpoint(arguments.checkpoint, arguments.config, labels), arguments)


def _convert_torchvision(arguments: argparse.Namespace) -> int:
    from ..convert import convert_torchvision, load_torchvision

    model = load_torchvision(arguments.architecture, arguments.checkpoint, arguments.weights)
    return _save(convert_torchvision(model, _labels(arguments.labels)), arguments)


def _save(conversion: "Conversion", arguments: argparse.Namespace) -> int:
    print(conversion)
    print(f"written to {conversion.save(arguments.folder, arguments.overwrite)}")
    return 0


def _labels(text: str | None) -> list[str] | None:
    """Names from a file, one a line, or from a list with commas."""
    if text is None:
        return None
    parts = Path(text).read_text(encoding="utf-8").splitlines() if Path(text).is_file() else text.split(",")
    return [part.strip() for part in parts if part.strip()]


ADD: dict[str, Add] = {"convert": _add_convert}
