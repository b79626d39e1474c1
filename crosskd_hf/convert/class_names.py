"""Names of the classes that a checkpoint predicts."""

from collections.abc import Sequence

from transformers import PreTrainedConfig

from .checkpoint import CheckpointError

COCO_NAMES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
    "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee",
    "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
    "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple",
    "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch",
    "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard", "cell phone",
    "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear",
    "hair drier", "toothbrush",
)  # fmt: skip
# COCO counts to 90 and leaves these numbers out.
_COCO_GAPS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
COCO_IDS = tuple(number for number in range(1, 91) if number not in _COCO_GAPS)
VOC_NAMES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
KNOWN = {len(names): names for names in (COCO_NAMES, VOC_NAMES)}


def choose_names(count: int, given: Sequence[str] | None, embedded: Sequence[str] | None) -> tuple[str, ...]:
    """The names of `count` classes: the given ones, else those in the checkpoint, else COCO's 80 or VOC's 20.

    Raises:
        CheckpointError: Another number of names, a name that occurs twice, or no names at all.
    """
    names = given if given is not None else embedded if embedded is not None else KNOWN.get(count)
    if names is None:
        raise CheckpointError(
            f"The checkpoint predicts {count} classes and doesn't name them: give their names in the order of training "
            f"(--labels NAME,NAME,... or a file with one name a line)."
        )
    if len(names) != count:
        source = "were given" if given is not None else "stand in the checkpoint"
        raise CheckpointError(
            f"{len(names)} class names {source} ({', '.join(map(repr, names[:5]))}, ...), but it predicts {count} "
            f"classes: give {count} names in the order of training (--labels)."
        )
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise CheckpointError(f"Class names occur twice: {twice[:5]}. Make them unique.")
    return tuple(names)


def set_classes(config: PreTrainedConfig, names: Sequence[str]) -> None:
    """Write names, and for COCO's classes the ids of its annotation files, into a config."""
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}
    config.category_ids = list(COCO_IDS) if tuple(names) == COCO_NAMES else None
