"""The classes of a student beside those of its data: compared before step 0, and in every batch before its update."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import datasets
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset
from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel

from ..data.class_names import are_placeholders, class_names, demand_same, listing
from ..data.report import DataError, found
from ..data.schema import demand_classes, labels_outside, names_of
from ..inference.head_width import check_width, demand_width
from ..inference.processors import check_processor, has_no_object
from .first_batch import check_form, tell_of_corners

logger = logging.getLogger(__name__)


def check_classes(model: PreTrainedModel, train: Any, evaluation: Any, columns: bool = True) -> None:
    """Compare the student's classes with those of its data.

    A student without names (LABEL_0, ...) is given those of the data, if it has as many classes. Data without names is
    taken as it is, which is logged.

    Args:
        model: The student.
        train: The training data, or None.
        evaluation: The evaluation data, or a dict of several, or None.
        columns: Whether training labels are the column `category`, not what a transform or collator makes of it.

    Raises:
        ValueError: The classes are others, or in another order, and both lists are in the message; or the student's
            head is not as wide as its `id2label` has names.
        DataError: Labels of a data set outside of [0, K), with their images.
    """
    check_width(model)
    nameless = False
    for what, dataset in (*_parts("training data", train), *_parts("evaluation data", evaluation)):
        names = names_of(dataset)
        if names is None or are_placeholders(names):
            nameless = True
        else:
            _compare(model.config, names, what)
        if isinstance(dataset, datasets.Dataset) and (columns or not what.startswith("training")):
            _check_range(dataset, class_names(model.config), what)
    if nameless:
        names = class_names(model.config)
        logger.warning(
            "The data doesn't name its classes: its labels are taken as the student's, 0 for %r to %d for %r.",
            names[0], len(names) - 1, names[-1],
        )  # fmt: skip


def check_head(model: PreTrainedModel, outputs: Any, processor: BaseImageProcessor | None = None) -> None:
    """Judge what a student made of its first batch.

    Args:
        model: The student.
        outputs: Of its forward.
        processor: Its image processor, which is judged here if the student is of no known family.

    Raises:
        ValueError: `logits` are not as wide as `id2label` has names, or the processor doesn't read them so.
    """
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
    if not isinstance(logits, Tensor):
        return
    width = logits.shape[-1]
    demand_width(model, width)
    if has_no_object(model) is None and processor is not None:
        check_processor(model, processor, no_object=width > len(class_names(model.config)))


class CheckedLabels:
    """A collator whose batches are of the form that losses take, with labels that are all classes of the student.

    Args:
        collator: Makes batches; `labels` in them is a list with `class_labels` (n,) of each image.
        num_classes: K, the number of classes.
        seen: Whether a first batch was judged before; it is not of a stream.
    """

    def __init__(
        self, collator: Callable[[Sequence[Any]], dict[str, Any]], num_classes: int, seen: bool = True
    ) -> None:
        self.collator = collator
        self.num_classes = num_classes
        self.seen = seen

    def __call__(self, examples: Sequence[Any]) -> dict[str, Any]:
        """The collator's batch, labels in the types that every loss takes.

        Raises:
            ValueError: As of `check_form` and `demand_classes`.
        """
        batch = self.collator(examples)
        labels = check_form(batch)
        if not self.seen:
            tell_of_corners(labels)
            self.seen = True
        demand_classes(labels, self.num_classes)
        for label in labels:
            label["class_labels"] = label["class_labels"].long()
            label["boxes"] = label["boxes"].float()
        return batch


def _parts(what: str, dataset: Any) -> Iterator[tuple[str, Any]]:
    """What a data set is made of, with a name for messages."""
    if isinstance(dataset, Mapping):
        for name, part in dataset.items():
            yield from _parts(f"{what} {name!r}", part)
    elif isinstance(dataset, ConcatDataset):
        for part in dataset.datasets:
            yield from _parts(what, part)
    elif isinstance(dataset, Subset):
        yield from _parts(what, dataset.dataset)
    elif dataset is not None:
        yield what, dataset


def _compare(config: PreTrainedConfig, names: Sequence[str], what: str) -> None:
    own = class_names(config)
    if are_placeholders(own) and len(own) == len(names):
        config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
        logger.warning("The student's classes had no names. They are called as in the %s: %s.", what, listing(names))
        return
    demand_same(names, own, what)


def _check_range(dataset: datasets.Dataset, names: Sequence[str], what: str) -> None:
    places = labels_outside(dataset, len(names))
    message = f"a label of the {what} is none of the student's classes 0 to {len(names) - 1}"
    fix = "map raw category ids to 0..K-1 (load_coco and load_objects do), or give the student as many classes"
    faults = found("error", "label-range", message, fix, places)
    if faults:
        raise DataError(faults)
