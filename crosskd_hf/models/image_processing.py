"""Image processor of the detectors: images to a padded batch, and a model's outputs to detections."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from torch import Tensor
from torchvision.ops import box_convert
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import AnnotationFormat, ImageInput, SizeDict, validate_annotations
from transformers.models.deformable_detr.image_processing_deformable_detr import (
    DeformableDetrImageProcessor,
    DeformableDetrImageProcessorKwargs,
)
from transformers.utils import ModelOutput

from .bounds import PIXELS, check_edges, check_pixels
from .nms import nms_by_class
from .pixels import FORMATS, array_to_8_bit, check_pixel_range, to_rgb


class DetectionImageProcessorKwargs(DeformableDetrImageProcessorKwargs, total=False):  # type: ignore[call-arg]
    """Settings of `DetectionImageProcessor` beyond those of `DeformableDetrImageProcessor`; all are saved with it.

    size_divisor: height and width of a batch are padded to multiples of this many pixels.
    channel_order: "rgb", or "bgr" for weights trained on images as OpenCV reads them. `image_mean` and `image_std` are
        given in this order.
    antialias: whether images that shrink are smoothed first. False is OpenCV's bilinear resize, by which MMDetection's
        detectors were trained: what is evaluated as they were published needs it, and fine texture aliases. Of images
        that grow, as COCO's at 800 pixels, both are the same.
    pixel_range: (lowest, highest) value of 16-bit, integer and float pixels, which become 0 and 255; None: 0 and 65535
        of integers, and the lowest and highest value of each float image. Images of 8 bits are left as they are.
    score_threshold: a class of a prior is a candidate if its classification score is above this, in [0, 1].
    candidates_per_level: so many candidates with the highest classification scores are kept per image and level.
    nms_threshold: of two boxes of one class whose IoU is above this, the one with the lower score goes, in [0, 1].
    max_detections: so many detections are kept per image.
    """

    size_divisor: int
    channel_order: Literal["rgb", "bgr"]
    antialias: bool
    pixel_range: list[float] | tuple[float, float] | None
    score_threshold: float
    candidates_per_level: int
    nms_threshold: float
    max_detections: int


@dataclass(frozen=True)
class Candidates:
    """Scored boxes of a batch before NMS: one row each, the rows of an image together and images in order."""

    image: Tensor  # (M,) int64, index in the batch
    label: Tensor  # (M,) int64
    score: Tensor  # (M,) float32 in [0, 1]
    box: Tensor  # (M, 4) float32, cxcywh relative to the unpadded image


class DetectionImageProcessor(DeformableDetrImageProcessor):
    """Resize, normalise and pad images; turn the outputs of a dense detector into detections.

    Takes PIL images of every mode, NumPy arrays and tensors on the scale 0 to 255 (uint16: see `pixel_range`), and COCO
    annotations as the DETR processors do; `area` and `iscrowd` may be missing. Images are resized
    (bilinear, see `antialias`) to `size`, {"shortest_edge", "longest_edge"} or {"height", "width"}, and padded on the
    right and at the bottom. Sizes are rounded to whole pixels, see `resized_size`. Boxes of the labels, and `size`
    beside them, refer to the resized image without its padding.

    The defaults of the post-processing are MMDetection's for dense detectors (`test_cfg` of its GFL config). A detector
    that finds its candidates in another way overrides `candidates`; clipping, NMS and limits stay the same.

    Raises ValueError for a setting out of its range, see `DetectionImageProcessorKwargs`.
    """

    valid_kwargs = DetectionImageProcessorKwargs
    do_convert_rgb = True
    size_divisor = 32
    channel_order = "rgb"
    antialias = True
    pixel_range = None
    score_threshold = 0.05
    candidates_per_level = 1000
    nms_threshold = 0.6
    max_detections = 100

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if self.channel_order not in ("rgb", "bgr"):
            raise ValueError(f'channel_order is {self.channel_order!r}; give "rgb" or "bgr"')
        for name in ("size_divisor", "candidates_per_level", "max_detections"):
            if not isinstance(value := getattr(self, name), int) or value < 1:
                raise ValueError(f"{name} is {value}; give a whole number of at least 1")
        for name in ("score_threshold", "nms_threshold"):
            if not isinstance(value := getattr(self, name), int | float) or not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}; give a number in [0, 1]")
        check_pixel_range(self.pixel_range)
        check_edges({"size": dict(self.size or {}), "size_divisor": self.size_divisor})
        check_pixels({name: getattr(self, name, None) for name in PIXELS})

    def open_image(self, path: str | Path) -> PIL.Image.Image:
        """An image file as the model was trained on it: upright 8-bit RGB.

        `pipeline` given a path, or a PIL image of another mode, converts by other rules before this processor is asked:
        16-bit and float values are clipped at 255, and of transparent images the colour beneath is seen.
        """
        with PIL.Image.open(path, formats=FORMATS) as image:
            return to_rgb(PIL.ImageOps.exif_transpose(image), self.pixel_range)

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Images of paths and addresses; what is an image already stays as it is."""
        if isinstance(image_url_or_urls, str) and os.path.isfile(image_url_or_urls):
            return self.open_image(image_url_or_urls)
        return super().fetch_images(image_url_or_urls)

    def process_image(
        self,
        image: ImageInput,
        channel_order: str = "rgb",
        pixel_range: Sequence[float] | None = None,
        do_rescale: bool | None = True,
        **kwargs: Any,
    ) -> Tensor:
        """One image as a (3, H, W) tensor in the order of channels that the weights were trained with."""
        if isinstance(image, PIL.Image.Image) and kwargs.get("do_convert_rgb") is not False:
            image = to_rgb(image, pixel_range)
        elif do_rescale and isinstance(image, Tensor) and image.dtype != torch.uint8:
            image = torch.from_numpy(array_to_8_bit(image.cpu().numpy(), pixel_range)).to(image.device)
        elif do_rescale and isinstance(image, np.ndarray):
            image = array_to_8_bit(image, pixel_range)
        pixels = super().process_image(image, **kwargs)
        return pixels.flip(0) if channel_order == "bgr" else pixels

    def _preprocess(
        self, images: list[Tensor], annotations: Any, return_segmentation_masks: bool | None, *_: Any, **settings: Any
    ) -> BatchFeature:
        """Resize, normalise and pad a batch. Unlike in the base class, padding never touches the labels."""
        if return_segmentation_masks:
            raise ValueError(
                "return_segmentation_masks=True was given, but these detectors know boxes only; leave it out"
            )
        annotations = [annotations] if isinstance(annotations, dict) else annotations
        if annotations is not None:
            if len(annotations) != len(images):
                raise ValueError(
                    f"{len(annotations)} annotations were given for {len(images)} images; give one per image"
                )
            validate_annotations(AnnotationFormat(settings["format"]), (AnnotationFormat.COCO_DETECTION,), annotations)

        pixels = [self._resize_and_normalize(image, settings) for image in images]
        data = _pad_and_stack(pixels, settings["pad_size"], settings["size_divisor"] if settings["do_pad"] else None)
        batch = BatchFeature(data, tensor_type=settings["return_tensors"])
        if annotations is not None:
            batch["labels"] = [
                BatchFeature(self._label(*row, settings), tensor_type=settings["return_tensors"])
                for row in zip(images, annotations, pixels, strict=True)
            ]
        return batch

    def resize(
        self, image: Tensor, size: SizeDict, resample: Any = None, antialias: bool = True, **kwargs: Any
    ) -> Tensor:
        """(..., 3, H, W) pixels at another size; a shape that is kept is rounded to whole pixels by `resized_size`."""
        if size.shortest_edge and size.longest_edge:
            height, width = image.shape[-2:]
            height, width = resized_size(height, width, size.shortest_edge, size.longest_edge)
            size = SizeDict(height=height, width=width)
        return super().resize(image, size, resample, antialias=antialias, **kwargs)

    def _resize_and_normalize(self, image: Tensor, settings: dict[str, Any]) -> Tensor:
        if settings["do_resize"]:
            image = self.resize(image, settings["size"], settings["resample"], settings["antialias"])
        names = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
        pixels = self.rescale_and_normalize(image, *(settings[name] for name in names))
        # where pixels are left as they are, models take floats of 0 to 255: uint8 would wait for a `Normalizer`
        return pixels if self.do_rescale or self.do_normalize else pixels.float()

    def _label(self, image: Tensor, annotation: Any, pixels: Tensor, settings: dict[str, Any]) -> dict[str, Any]:
        """The label of one image: boxes in the frame of `pixels`, the resized and still unpadded image."""
        annotation = _complete(annotation)
        label = self.prepare_annotation(image, annotation, AnnotationFormat(settings["format"]))
        label = self.resize_annotation(label, orig_size=image.shape[-2:], target_size=pixels.shape[-2:])
        return self.normalize_annotation(label, pixels.shape[-2:]) if settings["do_convert_annotations"] else label

    @torch.no_grad()
    def post_process_object_detection(
        self,
        outputs: ModelOutput,
        threshold: float = 0.0,
        target_sizes: Tensor | Sequence[tuple[int, int]] | None = None,
        *,
        score_threshold: float | None = None,
        candidates_per_level: int | None = None,
        nms_threshold: float | None = None,
        max_detections: int | None = None,
    ) -> list[dict[str, Tensor]]:
        """Detections of each image, the highest score first.

        outputs: what `candidates` reads, for B images.
        threshold: only detections with a final score above this are returned, in [0, 1]. At its default
            `score_threshold` alone decides, as in MMDetection. Where a centerness is multiplied in, final scores may
            lie below `score_threshold`: keep the default when computing AP.
        target_sizes: (height, width) per image, as a (B, 2) tensor or a sequence: boxes are returned in its pixels.
            Without it they are relative, in [0, 1].
        The other arguments replace the processor's own settings in this call.

        Returns per image `scores` (D,) in [0, 1], `labels` (D,) int64 and `boxes` (D, 4) xyxy, D <= max_detections.
        Raises ValueError if `target_sizes` doesn't hold one size per image.
        """
        batch_size = len(outputs["logits"])
        if target_sizes is not None and len(target_sizes) != batch_size:
            raise ValueError(
                f"target_sizes holds {len(target_sizes)} sizes for {batch_size} images; give one per image"
            )
        score_threshold = self.score_threshold if score_threshold is None else score_threshold
        per_level = self.candidates_per_level if candidates_per_level is None else candidates_per_level
        nms_threshold = self.nms_threshold if nms_threshold is None else nms_threshold
        max_detections = self.max_detections if max_detections is None else max_detections

        # No final score exceeds its classification score, and no box suppresses one with a higher score: what can't
        # reach the threshold may go first, and nothing changes but the time.
        found = self.candidates(outputs, max(score_threshold, threshold), per_level)
        boxes = box_convert(found.box, "cxcywh", "xyxy").clamp(0, 1)
        rows = ((boxes[:, 2:] > boxes[:, :2]).all(1) & (found.score > threshold)).nonzero().squeeze(1)
        image, boxes = found.image[rows], boxes[rows]
        if target_sizes is not None:
            sizes = torch.stack([torch.as_tensor(size) for size in target_sizes]).to(boxes)  # (B, 2)
            boxes = boxes * sizes.flip(1).repeat(1, 2)[image]

        counts = torch.bincount(image, minlength=batch_size).tolist()
        columns = (column.split(counts) for column in (found.score[rows], found.label[rows], boxes))
        results = []
        for scores, labels, xyxy in zip(*columns, strict=True):
            kept = nms_by_class(xyxy, scores, labels, nms_threshold, max_detections)
            results.append({"scores": scores[kept], "labels": labels[kept], "boxes": xyxy[kept]})
        return results

    def candidates(self, outputs: ModelOutput, score_threshold: float, candidates_per_level: int) -> Candidates:
        """The (prior, class) pairs of a detector's outputs that NMS shall see.

        Reads `logits` (B, N, K), `pred_boxes` (B, N, 4) relative cxcywh, `centerness` (B, N) logits or None and
        `level_lengths` (B, L), priors per level, or None for one level. Thresholding and the best of each level go by
        the classification score; only then it is multiplied by the centerness (MMDetection, `base_dense_head.py`).
        With a box per class, `pred_boxes` (B, N, K, 4), the priors are the regions of a two-stage detector, few and
        of no level: then all pairs above the threshold are candidates (MMDetection, `bbox_head.py`).
        Fields are read as keys: a pipeline hands on a plain `ModelOutput` without those that were None.
        """
        logits, centerness, lengths = outputs["logits"].float(), outputs.get("centerness"), outputs.get("level_lengths")
        least = torch.tensor(score_threshold, dtype=torch.float64).logit().item()  # so the scores needn't all be made
        if outputs["pred_boxes"].ndim == 4:
            image, prior, label = (logits > least).nonzero().unbind(1)
            score = logits[image, prior, label].sigmoid()
            return Candidates(image, label, score, outputs["pred_boxes"][image, prior, label].float())
        levels = [[logits.shape[1]]] * len(logits) if lengths is None else lengths.tolist()
        image, prior, label = _highest_pairs(logits, levels, least, candidates_per_level)
        score = logits[image, prior, label].sigmoid()
        if centerness is not None:
            score = score * centerness[image, prior].float().sigmoid()
        return Candidates(image, label, score, outputs["pred_boxes"][image, prior].float())


def resized_size(height: int, width: int, shortest: int, longest: int | None) -> tuple[int, int]:
    """(height, width) of an image resized to `shortest`, its shape kept, rounded half up as mmcv does; at least 1 px.

    The longer side is at most `longest`, which wins over the shorter side; None: no limit.
    """
    scale = shortest / min(height, width)
    if longest is not None:
        scale = min(scale, longest / max(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def _complete(annotation: dict[str, Any]) -> dict[str, Any]:
    """The annotations of an image with width x height where an object has no `area`.

    Raises:
        ValueError: an object without box or class, or an image id that is no integer.
    """
    if not isinstance(annotation["image_id"], int | np.integer):
        raise ValueError(f"image_id is {annotation['image_id']!r}; give an integer")
    objects = []
    for entry in annotation["annotations"]:
        box, label = entry.get("bbox"), entry.get("category_id")
        if not (_is_box(box) and isinstance(label, int | np.integer)):
            raise ValueError(
                f"An object of image {annotation['image_id']} has bbox={box!r} and category_id={label!r}; "
                "give bbox=[left, top, width, height] in pixels and an integer category_id"
            )
        area = entry.get("area")
        objects.append({**entry, "area": box[2] * box[3] if area is None else area})
    return {**annotation, "annotations": objects}


def _is_box(box: Any) -> bool:
    try:
        return len(box) == 4 and all(math.isfinite(value) for value in box)
    except TypeError:  # None, a text, ...
        return False


def _pad_and_stack(images: list[Tensor], pad_size: SizeDict | None, divisor: int | None) -> dict[str, Tensor]:
    """(3, H_i, W_i) images in the top left of one batch: `pixel_values` (B, 3, H, W), `pixel_mask` (B, H, W) int64.

    H and W are multiples of `divisor` that hold every image, and at least `pad_size`. Without a divisor images aren't
    padded and must be of one size.
    """
    if divisor is None:
        return {"pixel_values": torch.stack(images)}
    least = (0, 0) if pad_size is None else (pad_size.height, pad_size.width)
    height, width = (
        math.ceil(max(edge, *(image.shape[axis] for image in images)) / divisor) * divisor
        for axis, edge in zip((-2, -1), least, strict=True)
    )
    values = images[0].new_zeros(len(images), len(images[0]), height, width)
    mask = torch.zeros(len(images), height, width, dtype=torch.int64, device=values.device)
    for index, image in enumerate(images):
        rows, columns = image.shape[-2:]
        values[index, :, :rows, :columns] = image
        mask[index, :rows, :columns] = 1
    return {"pixel_values": values, "pixel_mask": mask}


def _highest_pairs(logits: Tensor, levels: list[list[int]], least: float, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The (prior, class) pairs of the `count` highest scores of each image and level, of those above a logit.

    Only priors whose highest class may be among them are looked at, so that time hardly depends on the scores.

    Args:
        logits: (B, N, K).
        levels: Per image the priors of each level, N in all.
        least: Pairs must be above this logit.
        count: So many pairs of each image and level at most; of equal scores the first ones.

    Returns:
        Image, prior and class of M pairs, image by image, level by level, the highest score first.
    """
    highest = logits.amax(-1)  # (B, N)
    images, priors, classes = [], [], []
    for image, lengths in enumerate(levels):
        start = 0
        for level in highest[image].split(lengths):
            wanted = ~(level <= least) & _may_be_highest(level, count)  # with those that are no number, in doubt
            rows = wanted.nonzero().squeeze(1) + start
            pairs = logits[image, rows]  # (R, K)
            row, label = ((pairs > least) & _may_be_highest(pairs.flatten(), count).view_as(pairs)).nonzero().unbind(1)
            best = pairs[row, label].sigmoid().argsort(descending=True, stable=True)[:count]
            images.append(torch.full_like(best, image))
            priors.append(rows[row[best]])
            classes.append(label[best])
            start += len(level)
    return torch.cat(images), torch.cat(priors), torch.cat(classes)


def _may_be_highest(logits: Tensor, count: int) -> Tensor:
    """(n,) bool: which of (n,) logits may have one of the `count` highest scores, the first ones where many are equal.

    The limit lies a little below: scores of two logits may be equal.
    """
    if len(logits) <= count:
        return torch.ones_like(logits, dtype=torch.bool)
    last = logits.nan_to_num(nan=-math.inf).topk(count, sorted=False).values.min()
    bound = (last.sigmoid().double() * (1 - 1e-6)).logit().to(logits)
    equal = logits == last
    return ~(logits < bound) & (~equal | (equal.cumsum(0) <= count))
