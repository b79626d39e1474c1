"""The command `crosskd-hf`: thin over the library. Each command imports what it needs, so that help is there sooner."""

import argparse
import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .text import escape_on_output, lines, one_line, strict_json

if TYPE_CHECKING:
    from .convert import Conversion
    from .create import Detector
    from .data.dataset import DetectionData
    from .data.loading import DetectionSplits

DESCRIPTION = (
    "Train small object detectors with large ones as their teachers (CrossKD), with Hugging Face models and data."
)
EPILOG = """exit status: 0 all is well, 1 a check found faults or something went wrong, 2 wrong usage
--debug, or CROSSKD_DEBUG=1 in the environment, shows the traceback of an error"""
PACKAGES = (
    "crosskd_hf", "torch", "torchvision", "transformers", "timm", "accelerate", "datasets", "huggingface_hub",
    "safetensors", "pycocotools", "scipy", "numpy", "pillow", "matplotlib",
)  # fmt: skip
INTERRUPTED = 130

Command = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Words after the program's name; by default those of the process.

    Returns:
        The exit status.
    """
    escape_on_output()
    words = list(sys.argv[1:] if argv is None else argv)
    arguments, rest = _parser().parse_known_args(words)
    if rest and arguments.command not in (_train, _distill):
        _refuse(rest, arguments.own)
    arguments.rest = rest
    try:
        status = int(arguments.command(arguments))
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if arguments.debug or os.environ.get("CROSSKD_DEBUG", "0") not in ("", "0"):
            raise
        known = isinstance(error, ValueError | OSError)
        kind = "" if known else f"{type(error).__name__}: "
        hint = "" if known else " (run again with --debug to see where)"
        print(f"error: {kind}{lines(str(error))}{hint}", file=sys.stderr)
        return 1


def _refuse(words: Sequence[str], parser: argparse.ArgumentParser) -> None:
    """Stop with what a command doesn't know, and the options that are spelt nearly like it."""
    from .sources import near

    known = [action.option_strings[0] for action in parser._actions if action.option_strings]
    unknown = next((word.split("=")[0] for word in words if word.startswith("-")), "")
    hint = near(unknown.replace("_", "-"), known) if unknown else ""
    parser.error(f"unrecognized arguments: {one_line(' '.join(words))}{hint}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "crosskd-hf", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"crosskd_hf {importlib.metadata.version('crosskd_hf')}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_convert(commands)
    _add_checks(commands)
    _add_convert_data(commands)
    _add_methods(commands)
    _add_train(commands)
    _add_evaluate(commands)
    _add_predict(commands)
    analyse = _add_analyse(commands)
    options = _command(commands, "options", _options, "Print all options, as docs/options.md.")
    options.set_defaults(
        parsers=[commands.choices[name] for name in ("evaluate", "predict", "check-data", "check-pair")] + analyse
    )
    _command(commands, "env", _env, "Print the versions of everything that matters, for a bug report.")
    return parser


def _command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, run: Command, text: str, more: str = ""
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name, help=text, description=text, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(command=run, own=parser)
    return parser


def _add_convert(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    text = "Turn a checkpoint of another library into a model folder that from_pretrained loads."
    parser = commands.add_parser("convert", help=text, description=text)
    sources = parser.add_subparsers(metavar="SOURCE", required=True)
    mmdet = _command(
        sources,
        "mmdet",
        _convert_mmdet,
        "GFL, ATSS, FCOS, RetinaNet, Faster R-CNN and Deformable DETR of MMDetection. The file is never executed.",
        "example: crosskd-hf convert mmdet gfl_r50_fpn_1x_coco.pth gfl-r50",
    )
    mmdet.add_argument("checkpoint", type=Path, help="the .pth file")
    mmdet.add_argument("--config", type=Path, help="MMDetection's config, if the file doesn't hold it; read as text")
    vision = _command(
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


def _add_checks(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    pair = _command(
        commands,
        "check-pair",
        _check_pair,
        "Say whether a teacher can teach a student, how, and at what cost. Exit status 1 if it can't.",
        "examples: crosskd-hf check-pair student-folder teacher-folder\n"
        "          crosskd-hf check-pair gfl:resnet18 teacher-folder --data photos/",
    )
    pair.add_argument("student", help="folder or Hub id, or a new one such as gfl:resnet18")
    pair.add_argument("teacher", help="folder or Hub id")
    pair.add_argument("--methods", nargs="+", default=["crosskd"], help="what is distilled (default: crosskd)")
    pair.add_argument("--data", nargs="+", help="data set in any known format: the teacher is evaluated on it")
    _add_format(pair)
    pair.add_argument("--annotations", type=Path, help="COCO-format json, instead of --data")
    pair.add_argument("--images", type=Path, help="folder of its images")
    pair.add_argument("--number", type=int, default=100, help="so many of them (default: 100)")
    data = _command(
        commands,
        "check-data",
        _check_data,
        "Name every fault of a data set, with file, line and fix. Exit status 1 if training would be wrong.",
        "examples: crosskd-hf check-data photos/\n          crosskd-hf check-data instances_train.json train/",
    )
    _add_data(data)
    data.add_argument("--train", type=Path, help="json of the training split, where a json of another one is given")
    data.add_argument("--all", action="store_true", help="list every place of a fault, not only the first ones")


def _add_convert_data(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    convert = _command(
        commands,
        "convert-data",
        _convert_data,
        "Check a data set of any known format, and write it as COCO jsons, one for each split.",
        "example: crosskd-hf convert-data photos/ photos-coco/",
    )
    convert.add_argument("path", help="folder, data.yaml, csv, json or Hub id of a data set")
    convert.add_argument("folder", type=Path, metavar="OUT", help="folder to write")
    convert.add_argument(
        "--images", choices=("link", "copy"), default="link",
        help="hard links, which take no room and copies where these aren't possible, or always copies (default: link)",
    )  # fmt: skip
    _add_format(convert)


def _add_data(parser: argparse.ArgumentParser) -> None:
    """Where a data set lies, for commands that read one."""
    parser.add_argument("path", nargs="?", help="folder, data.yaml, csv, json or Hub id of a data set; or a COCO json")
    parser.add_argument("images", nargs="?", help="folder of the COCO json's images")
    parser.add_argument("--data", nargs="+", help="the same as PATH; several are joined by the names of their classes")
    _add_format(parser)


def _add_format(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data-format", "--data_format", help="coco, voc, yolo, csv, imagefolder or datasets (default: what is there)"
    )
    parser.add_argument(
        "--one-based",
        "--one_based",
        action=argparse.BooleanOptionalAction,
        help="VOC: the first pixel has the number 1",
    )
    parser.add_argument(
        "--val-fraction", "--val_fraction", type=float, default=0.2,
        help="share of the images that is drawn for validation if there is no such split (default: 0.2)",
    )  # fmt: skip


def _data_source(arguments: argparse.Namespace) -> list[str]:
    """What `load_detection_dataset` reads; empty if a COCO json and its image folder are given."""
    if arguments.data and arguments.path:
        raise ValueError(f"Give {arguments.path} or --data, not both.")
    if not arguments.data and not arguments.path:
        raise ValueError("Give a data set: its folder, data.yaml, csv, json or Hub id.")
    if arguments.images is None:
        return arguments.data or [arguments.path]
    if arguments.data_format is not None or arguments.one_based is not None:
        raise ValueError("--data-format and --one-based have no effect beside a COCO json and its image folder.")
    return []


def _add_methods(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    methods = _command(
        commands,
        "methods",
        _methods,
        "Print the distillation methods with their options, defaults, sources and detectors.",
        "example: crosskd-hf methods crosskd",
    )
    methods.add_argument("name", nargs="?", help="one of them, or a class of your own as my_package.my_module:MyConfig")


def _add_analyse(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> list[argparse.ArgumentParser]:
    text = "The papers' figures of a student and its teachers on any data: each a picture and a csv file."
    parser = commands.add_parser("analyse", help=text, description=text)
    figures = parser.add_subparsers(metavar="FIGURE", required=True)
    for name, (run, what, number) in {
        "conflict": (
            _conflict,
            "Share of locations where teachers contradict the labels, against the threshold.",
            64,
        ),
        "targets": (_targets, "Heat maps: labels' targets, teacher, the student's own scores, cross-head scores.", 4),
        "gradients": (_gradients, "Heat maps: where methods move the features that the student's head reads.", 4),
        "curves": (_curves, "Train by several methods: L1(student, teacher), L1(student, labels), AP by epoch.", 16),
    }.items():
        figure = _command(
            figures,
            name,
            run,
            what,
            f"example: crosskd-hf analyse {name} STUDENT TEACHER --data photos/",
        )
        word = "folder or Hub id" + (", or a new one such as gfl:resnet18" if name == "curves" else "")
        figure.add_argument("student", help=word)
        several = "+" if name == "conflict" else None
        figure.add_argument("teacher", nargs=several, help="folder or Hub id", metavar="TEACHER")
        figure.add_argument(
            "--data", nargs="+", required=True, help="folder, data.yaml, csv, json or Hub id of a data set"
        )
        _add_format(figure)
        figure.add_argument("--number", type=int, default=number, help=f"images with objects (default: {number})")
        figure.add_argument("--out", type=Path, default=Path("figures"), help="folder to write (default: figures)")
    _add_figure_options(figures.choices)
    return [*figures.choices.values()]


def _add_figure_options(figures: Mapping[str, argparse.ArgumentParser]) -> None:
    for name in ("conflict", "targets", "gradients"):
        figures[name].add_argument(
            "--split", choices=("train", "val", "test"), help="of the data set (default: val, or its only)"
        )
    figures["targets"].add_argument("--plain-kd", help="the same student trained with plain KD: one more column")
    figures["gradients"].add_argument(
        "--methods", nargs="+", default=["pkd", "crosskd"], help="a column each (default: pkd crosskd)"
    )
    curves = figures["curves"]
    curves.add_argument(
        "--methods", nargs="+", default=["kd", "crosskd"], help="a run each, or 'baseline' (default: kd crosskd)"
    )
    curves.add_argument("--epochs", type=float, help="of each run (default: as crosskd-hf train)")
    curves.add_argument("--width", type=int, default=256, help="channels of a new student (default: 256)")
    curves.add_argument("--longest-edge", type=int, help="longest side of images in px, for a new student")
    curves.add_argument("--seed", type=int, default=42, help="of all runs (default: 42)")


def _add_train(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    text = (
        "Train a student, with or without a teacher. Takes all options of transformers' TrainingArguments but --debug."
    )
    both = "Train a student twice, with and without a teacher, and say whether the teacher helped."
    for name, what, run in (("train", text, _train), ("distill", both, _distill)):
        parser = commands.add_parser(name, help=what, add_help=False, allow_abbrev=False)
        parser.add_argument("--debug", action="store_true")
        parser.add_argument("-h", "--help", action="store_true", dest="full_help")
        parser.add_argument("--help-all", action="store_true")
        parser.set_defaults(command=run)


def _add_evaluate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    pictures = _command(
        commands,
        "report",
        _report,
        "Make the curves and pictures of a finished run again.",
        "example: crosskd-hf report run",
    )
    pictures.add_argument("folder", type=Path, help="of crosskd-hf train or distill")
    evaluate = _command(
        commands,
        "evaluate",
        _evaluate,
        "Measure COCO AP of a model. Classes are matched by name.",
        "examples: crosskd-hf evaluate student-folder photos/ --split test\n"
        "          crosskd-hf evaluate student-folder instances_val.json val/",
    )
    evaluate.add_argument("model", help="folder or Hub id")
    _add_data(evaluate)
    evaluate.add_argument("--split", choices=("train", "val", "test"), help="of a data set (default: val, or its only)")
    evaluate.add_argument("--batch-size", type=int, default=8, help="images at once (default: 8)")
    evaluate.add_argument("--workers", type=int, default=0, help="processes that read images (default: 0)")
    _add_speed(evaluate)
    evaluate.add_argument(
        "--max-detections", "--max_detections", type=int,
        help="so many of an image are evaluated; above 100 also of each class (default: the processor's; 100)",
    )  # fmt: skip
    evaluate.add_argument("--json", type=Path, help="also write the metrics, in [0, 1], to this file; null: no truth")


def _add_predict(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    predict = _command(
        commands,
        "predict",
        _predict,
        "Detect objects in images and videos; write pictures and predictions.json.",
        "examples: crosskd-hf predict student-folder photos/ --out found/\n"
        "          crosskd-hf predict student-folder 'photos/**/*.jpg' clip.mp4 --format coco csv",
    )
    predict.add_argument("model", help="folder or Hub id")
    predict.add_argument(
        "source", nargs="+", help="images, videos, folders, patterns such as 'photos/*.jpg', or addresses (https://...)"
    )
    predict.add_argument("--out", type=Path, default=Path("predictions"), help="folder to write (default: predictions)")
    predict.add_argument("--threshold", type=float, default=0.5, help="lowest score to report (default: 0.5)")
    _add_speed(predict)
    predict.add_argument(
        "--format", nargs="+", default=[], metavar="FORMAT",
        help="also write the boxes as coco (coco.json), yolo (labels/ and data.yaml) or csv (boxes.csv)",
    )  # fmt: skip
    predict.add_argument(
        "--nms", type=float, nargs="+", default=[], metavar="IOU",
        help="instead, show every image at several NMS thresholds side by side: nms.png and nms.csv",
    )  # fmt: skip
    predict.add_argument("--device", help="such as cpu or cuda:1 (default: the first GPU, if there is one)")
    cost = _command(
        commands,
        "cost",
        _cost,
        "Compare parameters, multiply-adds and images a second of detectors.",
        "example: crosskd-hf cost gfl:resnet18 gfl:resnet50 student-folder",
    )
    cost.add_argument("models", nargs="+", metavar="MODEL", help="folder, Hub id, ARCHITECTURE:BACKBONE or preset")
    cost.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="px (default: 800 1280)")
    cost.add_argument("--device", help="where speed is measured (default: the first GPU, if there is one, or the CPU)")
    cost.add_argument("--no-speed", action="store_true", help="only count, which takes seconds")


def _add_speed(parser: argparse.ArgumentParser) -> None:
    """How a model runs, for commands that run one."""
    parser.add_argument("--fast", action="store_true", help="bf16 autocast and channels_last, as the device gains")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--channels-last", "--channels_last", action="store_true", help="weights channels last")


def _speed(arguments: argparse.Namespace) -> dict[str, bool]:
    return {name: getattr(arguments, name) for name in ("bf16", "channels_last", "fast")}


def _convert_mmdet(arguments: argparse.Namespace) -> int:
    from .convert import convert_mmdet_checkpoint

    labels = _labels(arguments.labels)
    return _save(convert_mmdet_checkpoint(arguments.checkpoint, arguments.config, labels), arguments)


def _convert_torchvision(arguments: argparse.Namespace) -> int:
    from .convert import convert_torchvision, load_torchvision

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


def _check_pair(arguments: argparse.Namespace) -> int:
    from .create import create_detector, is_new
    from .data.class_names import class_names
    from .experiments.check_pair import check_pair
    from .inference.loading import load_detector

    data = _pair_data(arguments)
    teacher, teacher_processor = load_detector(arguments.teacher)
    classes = class_names(teacher.config) if data is None and is_new(arguments.student) else data
    student, processor = create_detector(arguments.student, classes, backbone_weights=None)
    chosen = arguments.methods
    report = check_pair(student, teacher, chosen, processor, teacher_processor, data, arguments.number)
    print(report)
    return 0 if report.ok else 1


def _pair_data(arguments: argparse.Namespace) -> "DetectionData | None":
    """What a teacher is evaluated on; None if nothing was given."""
    from .data.dataset import load_coco
    from .data.loading import load_detection_dataset

    if (arguments.annotations is None) != (arguments.images is None):
        raise ValueError("Give both of --annotations and --images, or neither.")
    if arguments.data and arguments.annotations:
        raise ValueError("Give --data or --annotations, not both.")
    if arguments.data:
        splits = load_detection_dataset(
            arguments.data, arguments.data_format, one_based=arguments.one_based, val_fraction=arguments.val_fraction
        )
        return splits["val"] if "val" in splits else next(iter(splits.values()))
    return None if arguments.annotations is None else load_coco(arguments.annotations, arguments.images)


def _methods(arguments: argparse.Namespace) -> int:
    from .distillation.reference import reference

    print(reference(arguments.name))
    return 0


def _side_by_side(model: Any, processor: Any, files: Any, arguments: argparse.Namespace) -> int:
    """Pictures of several NMS thresholds instead of predictions."""
    from .analysis.nms import side_by_side
    from .create import Detector

    if arguments.format:
        raise ValueError("--format has no effect beside --nms, which writes nms.csv.")
    return _written(side_by_side(Detector(model, processor), files, arguments.out, arguments.nms, arguments.threshold))


def _split(arguments: argparse.Namespace) -> "DetectionData":
    """The data of a figure."""
    splits = _splits(arguments)
    return splits[arguments.split or ("val" if "val" in splits else next(iter(splits)))]


def _splits(arguments: argparse.Namespace) -> "DetectionSplits":
    from .data.loading import load_detection_dataset

    if arguments.number < 1:
        raise ValueError(f"--number {arguments.number} must be at least 1.")
    return load_detection_dataset(
        arguments.data, arguments.data_format, one_based=arguments.one_based, val_fraction=arguments.val_fraction
    )


def _detector(source: str) -> "Detector":
    from .create import Detector
    from .inference.loading import load_detector

    return Detector(*load_detector(source))


def _adapters(student: str) -> Path:
    """Where a student's trained adapters lie, if there are any."""
    from .training.adapters import FILE

    return Path(student) / FILE


def _conflict(arguments: argparse.Namespace) -> int:
    from .analysis.conflict import conflict

    teachers = {Path(source).name: _detector(source) for source in arguments.teacher}
    if len(teachers) < len(arguments.teacher):
        teachers = {source: _detector(source) for source in arguments.teacher}
    student, adapters = _detector(arguments.student), _adapters(arguments.student)
    return _written(conflict(student, teachers, _split(arguments), arguments.out, arguments.number, adapters))


def _targets(arguments: argparse.Namespace) -> int:
    from .analysis.targets import targets

    plain = None if arguments.plain_kd is None else _detector(arguments.plain_kd)
    pair, adapters = (_detector(arguments.student), _detector(arguments.teacher)), _adapters(arguments.student)
    return _written(targets(*pair, _split(arguments), arguments.out, arguments.number, plain, adapters))


def _gradients(arguments: argparse.Namespace) -> int:
    from .analysis.gradients import gradients

    pair = _detector(arguments.student), _detector(arguments.teacher)
    return _written(gradients(*pair, _split(arguments), arguments.out, arguments.number, arguments.methods))


def _curves(arguments: argparse.Namespace) -> int:
    from .create import ImageSize
    from .experiments.curves import curves

    splits = _splits(arguments)
    if splits.val is None:
        raise ValueError(f"{splits.source} has no validation split, on which the curves are measured.")
    settings = {} if arguments.epochs is None else {"num_train_epochs": arguments.epochs}
    return _written(
        curves(
            arguments.student,
            _detector(arguments.teacher),
            splits.train,
            splits.val,
            arguments.out,
            arguments.methods,
            arguments.number,
            width=arguments.width,
            image_size=ImageSize.of(None, arguments.longest_edge),
            seed=arguments.seed,
            **settings,
        )
    )


def _written(paths: Sequence[Path]) -> int:
    for path in paths:
        print(path)
    return 0


def _options(arguments: argparse.Namespace) -> int:
    from .experiments.options import reference

    print(reference(arguments.parsers))
    return 0


def _check_data(arguments: argparse.Namespace) -> int:
    from .data.categories import CategoryMap
    from .data.coco_json import read_coco
    from .data.inspection import check_data
    from .data.loading import check_detection_dataset

    source, most = _data_source(arguments), None if arguments.all else 5
    if source:
        if arguments.train is not None:
            raise ValueError("--train has no effect on a data set that has its own splits.")
        reports = check_detection_dataset(
            source, arguments.data_format, one_based=arguments.one_based, val_fraction=arguments.val_fraction
        )
        print(reports.describe(most))
        return 0 if reports.ok else 1
    categories = None
    if arguments.train is not None:
        training = read_coco(arguments.train)
        categories = CategoryMap.from_coco(training.categories, {int(raw) for raw in training.annotation_categories})
    report = check_data(arguments.path, arguments.images, categories)
    print(report.describe(most))
    return 0 if report.ok else 1


def _convert_data(arguments: argparse.Namespace) -> int:
    from .data.loading import load_detection_dataset
    from .data.writing import write_coco

    data = load_detection_dataset(
        arguments.path, arguments.data_format, one_based=arguments.one_based, val_fraction=arguments.val_fraction
    )
    print(data)
    for path in write_coco(data, arguments.folder, arguments.images):
        print(f"written to {path}")
    return 0


def _train(arguments: argparse.Namespace) -> int:
    from .experiments.command_line import help_text, make_parser
    from .experiments.train import RunArguments, train_from_words
    from .inference.evaluation import table

    if arguments.full_help or arguments.help_all:
        print(help_text(make_parser(RunArguments), arguments.help_all))
        return 0
    metrics, config = train_from_words(arguments.rest)
    if config.process_index == 0:
        print(table(metrics) if metrics else "not evaluated: no validation data was given")
        print(f"written to {config.output_dir}")
    return 0


def _cost(arguments: argparse.Namespace) -> int:
    import torch

    from .experiments.cost import SIZE, measure, table

    size = SIZE if arguments.size is None else (arguments.size[0], arguments.size[1])
    device = None if arguments.no_speed else arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    print(table([measure(model, size, device) for model in arguments.models], size, device))
    return 0


def _distill(arguments: argparse.Namespace) -> int:
    from .experiments.command_line import help_text, make_parser
    from .experiments.distill import DistillArguments, distill_from_words

    if arguments.full_help or arguments.help_all:
        print(help_text(make_parser(DistillArguments, "crosskd-hf distill"), arguments.help_all))
        return 0
    result = distill_from_words(arguments.rest)
    print(result)
    print(f"written to {result.folder}")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from .experiments.distill import report

    for path in report(arguments.folder):
        print(path)
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from .data.loading import load_detection_dataset
    from .inference.evaluation import evaluate, evaluate_data, table
    from .inference.loading import load_detector

    source, how = _data_source(arguments), (arguments.batch_size, arguments.workers)
    options = {**_speed(arguments), "max_detections": arguments.max_detections}
    if source:
        data = load_detection_dataset(
            source, arguments.data_format, one_based=arguments.one_based, val_fraction=arguments.val_fraction
        )
        name = arguments.split or ("val" if "val" in data else next(iter(data)))
        print(f"{data.source}, split {name}", *(f"  {note}" for note in data.notes), sep="\n")
        metrics = evaluate_data(*load_detector(arguments.model), data[name], *how, **options)
    elif arguments.split is not None:
        raise ValueError("--split has no effect beside a COCO json and its image folder.")
    else:
        metrics = evaluate(*load_detector(arguments.model), arguments.path, arguments.images, *how, **options)
    print(table(metrics))
    if arguments.json is not None:
        arguments.json.write_text(strict_json(metrics, indent=2) + "\n")
    return 0


def _predict(arguments: argparse.Namespace) -> int:
    from .inference.detection import to_device
    from .inference.files import open_sources
    from .inference.loading import load_detector
    from .inference.predict import predict_to_folder

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


def _env(_: argparse.Namespace) -> int:
    import torch

    print(f"{'python':16s} {platform.python_version()}")
    print(f"{'platform':16s} {platform.platform()}")
    for name in PACKAGES:
        print(f"{name:16s} {importlib.metadata.version(name)}")
    count = torch.cuda.device_count()
    devices = ", ".join(torch.cuda.get_device_name(index) for index in range(count))
    print(f"{'cuda':16s} {torch.version.cuda or 'none'}, devices: {devices or 'none'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
