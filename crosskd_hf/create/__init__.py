"""A detector from one word: a new one as "gfl:resnet18", a folder, or an id of the Hub, for the classes of a data set.

model, processor = create_detector("gfl:resnet18", data)
model, processor = create_detector("SenseTime/deformable-detr", data)     # with a head for the classes of the data
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import datasets
import timm
from transformers import BaseImageProcessor, PreTrainedModel

from ..data.categories import CategoryMap
from ..data.class_names import are_placeholders, are_reordered, are_same, class_names, listing
from ..data.dataset import DetectionData
from ..data.schema import names_of
from ..inference.loading import load_detector
from ..sources import check_source, near
from .dense import ARCHITECTURES, build_dense
from .new_classes import NewClasses, name_classes, with_classes
from .spec import DetectorSpec, ImageSize
from .transformer import TRANSFORMERS, build_processor, build_transformer, fit_queries
from .weights import find_weights

__all__ = [
    "ARCHITECTURES",
    "TRANSFORMERS",
    "Detector",
    "DetectorSpec",
    "ImageSize",
    "NewClasses",
    "build_detector",
    "create_detector",
    "is_new",
    "with_classes",
]

logger = logging.getLogger(__name__)


class Detector(NamedTuple):
    """A detector and the image processor that belongs to it."""

    model: PreTrainedModel
    processor: BaseImageProcessor


def create_detector(
    source: str | os.PathLike[str],
    data: DetectionData | CategoryMap | datasets.Dataset | Sequence[str] | None = None,
    *,
    backbone_weights: str | None = "auto",
    width: int = 256,
    image_size: ImageSize | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    **fields: Any,
) -> Detector:
    """Make or load a detector for the classes of `data`.

    Args:
        source: "ARCHITECTURE:BACKBONE" for a new one (`ARCHITECTURES` and `TRANSFORMERS` list the former, timm the
            latter), a folder, or an id of the Hub.
        data: What it shall detect: a data set, or names of classes. A trained detector with other classes gets a head
            for these: weights of shared names are kept, the others start anew, and the log says which. One with the
            same classes keeps its head and its order: train it on `data.for_model(model.config)`. None: a trained
            detector stays as it is.
        backbone_weights: Of a new one. "auto": timm's default weights if they are in the cache or the Hub answers,
            random ones with a warning otherwise. "timm", a tag of timm or a file: these or an error. None: random.
        width: Channels of a new one: of pyramid and towers, or of the transformer.
        image_size: Of a new one; None: the usual 800 x 1333 px, or 640 x 640 for RT-DETR and its relatives.
        revision: Branch, tag or commit on the Hub.
        trust_remote_code: Whether code that lies beside the weights may run.
        fields: Further fields of a new one's configuration.

    Raises:
        ValueError: An unknown architecture or backbone, a new detector without `data`, incomplete weights.
        OSError: There is no such folder, or no such model on the Hub.
    """
    categories = None if data is None else _categories(data)
    name = os.fspath(source)
    if is_new(name):
        if categories is None:
            raise ValueError(f"A new detector {name!r} needs data, or a list of class names: what shall it detect?")
        spec = DetectorSpec.parse(name, width=width, fields=tuple(fields.items()))
        _check_names(spec)
        spec = find_weights(fit_queries(spec, image_size), backbone_weights)
        return Detector(build_detector(spec, categories), _processor(spec, image_size))
    check_source(name, revision, (*ARCHITECTURES, *TRANSFORMERS))
    model, processor = load_detector(source, revision, trust_remote_code)
    return Detector(model if categories is None else _for_classes(model, categories, name), processor)


def chosen_weights(sources: Sequence[str], wanted: str) -> str:
    """`backbone_weights` of new detectors with "auto" replaced by what it means now: "timm" or "none".

    Args:
        sources: As of :func:`create_detector`. If it means one for some of them and the other for others, it stays.
        wanted: The option.
    """
    if wanted != "auto":
        return wanted
    specs = [DetectorSpec.parse(source) for source in sources if is_new(source)]
    for spec in specs:
        _check_names(spec)
    found = {find_weights(spec, wanted).backbone_weights or "none" for spec in specs if spec.backbone}
    return found.pop() if len(found) == 1 else wanted


def is_new(source: str | os.PathLike[str]) -> bool:
    """Whether a word means a new detector: an architecture, or "ARCHITECTURE:BACKBONE", and no folder of that name.

    Raises:
        ValueError: Something with a colon whose first part is no architecture.
    """
    name = os.fspath(source)
    architecture, colon, _ = name.partition(":")
    if os.path.exists(name):
        return False
    if architecture in ARCHITECTURES or architecture in TRANSFORMERS:
        return True
    if colon and len(architecture) > 1 and os.sep not in name:  # one letter is a drive
        known = (*ARCHITECTURES, *TRANSFORMERS)
        raise ValueError(
            f"Unknown architecture {architecture!r} in {name!r}{near(architecture, known)} Known are "
            f"{', '.join(known)}."
        )
    return False


def build_detector(spec: DetectorSpec, categories: CategoryMap) -> PreTrainedModel:
    """Make a new detector of the classes in `categories`.

    Raises:
        ValueError: Unknown architecture, or a backbone without pyramid features.
    """
    if spec.architecture in TRANSFORMERS:
        return build_transformer(spec, categories)
    if spec.architecture not in ARCHITECTURES:
        known = (*ARCHITECTURES, *TRANSFORMERS)
        raise ValueError(f"architecture={spec.architecture!r}: choose one of {', '.join(known)}.")
    return build_dense(spec, categories)


def _check_names(spec: DetectorSpec) -> None:
    if spec.backbone and ":" not in spec.backbone and not timm.is_model(spec.backbone):
        raise ValueError(
            f"timm has no backbone {spec.backbone!r}{near(spec.backbone, timm.list_models())} "
            "timm.list_models() has all names."
        )


def _processor(spec: DetectorSpec, image_size: ImageSize | None) -> BaseImageProcessor:
    if spec.architecture in TRANSFORMERS:
        return build_processor(spec, image_size)
    return spec.image_processor(size=(image_size or ImageSize()).as_size())


def _categories(data: DetectionData | CategoryMap | datasets.Dataset | Sequence[str]) -> CategoryMap:
    if isinstance(data, DetectionData):
        return data.categories
    if isinstance(data, CategoryMap):
        return data
    names = names_of(data) if isinstance(data, datasets.Dataset) else data
    if names is None or isinstance(names, str):
        raise ValueError(
            f"data={data!r} doesn't say which classes there are: give what load_coco or load_detection_dataset "
            "returns, or a list of class names."
        )
    return CategoryMap(tuple(range(len(names))), tuple(names))


def _for_classes(model: PreTrainedModel, categories: CategoryMap, name: str) -> PreTrainedModel:
    own = class_names(model.config)
    if are_placeholders(own) and len(own) == len(categories):
        name_classes(model.config, categories)
        return model
    if are_same(categories.names, own) or are_reordered(categories.names, own):
        return model
    model, change = with_classes(model, categories)
    logger.warning("%s gets a head for %s. %s", name, listing(categories.names, 10), change)
    return model
