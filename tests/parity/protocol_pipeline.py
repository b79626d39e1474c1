"""From image files to batches: sizes, pixels, labels, padding, valid priors, filters, sampling; beside the authors'."""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import box_convert

from crosskd_hf.create import DetectorSpec
from crosskd_hf.data import DetectionCollator, TrainTransform, load_coco
from crosskd_hf.data.collators import is_trained_on, make_record
from crosskd_hf.data.dataset import DetectionData
from crosskd_hf.data.sampling import batches_of_one_orientation
from crosskd_hf.data.transforms import RandomCrop, clean_objects, crop, resize, select_objects
from crosskd_hf.models import DetectionImageProcessor, image_processor
from crosskd_hf.models.pyramid import valid_priors
from tests.parity.protocol_evaluation import split_of
from tests.parity.protocol_fields import UNKNOWN, Field, numbers, unknown
from tests.parity.protocol_postprocess import tiny
from tests.parity.protocol_transforms import read_steps

Case = dict[str, Any]
BOXES = 1e-3  # px
# Of single samples and of means and deviations: two levels of grey, as two libraries round differently.
TOLERANCES = {"imagenet": (0.035, 0.01), "caffe": (2.0, 0.5)}
CAFFE = (("caffe_stride", True),)
IMAGE = {"id", "ori_shape", "img_shape", "scale_factor", "flip", "objects", "crowds"}
KNOWN = {"name", "split", "transforms", "note", "images", "batches"}
LISTED = 6  # boxes of an image that a file spells out


def compare(case: Case, coco: Path) -> list[Field]:
    """The fields of a file of the pipeline."""
    if "made" in case:
        return [*_filters(case, coco), *_made(case["made"]), *_batches(case["batches"], coco)]
    data = split_of(coco, case["split"]).dataset
    odd = list(unknown("", case, KNOWN))
    if case["name"] == "crop":
        return [*odd, *_crops(case["images"], data)]
    steps, others = read_steps("transforms", case["transforms"])
    (shortest,), longest = steps.shortest, steps.longest  # without chance: one size
    transform = None
    if any(step["type"] == "RandomFlip" for step in case["transforms"]):
        transform = TrainTransform(steps.flip, (shortest,), longest, antialias=False)
    found = _images(case["images"], data, transform, {"shortest_edge": shortest, "longest_edge": longest})
    return [*odd, *others, *found, *_pixels(case.get("batches", []), data, transform, (shortest, longest))]


def processor_of(kind: str, edges: Sequence[int]) -> DetectionImageProcessor:
    """The processor of a kind of pixels: statistics, order of the channels and divisor of the padding."""
    size = {"shortest_edge": min(edges), "longest_edge": max(edges)}
    statistics, _, divisor = kind.split("_")
    if statistics == "caffe":
        processor = DetectorSpec("fcos", fields=CAFFE).image_processor(size=size, antialias=False)
    else:
        processor = image_processor("deformable_detr" if divisor == "1" else "gfl", size=size, antialias=False)
    if processor.size_divisor != int(divisor):
        raise ValueError(f"no processor pads {kind} to a multiple of {divisor}")
    return processor


def rows_of(data: datasets.Dataset, ids: Sequence[int]) -> list[dict[str, Any]]:
    """Examples by their image ids."""
    index = {image_id: row for row, image_id in enumerate(data["image_id"])}
    return [data[index[image_id]] for image_id in ids]


def _images(
    expected: list[Case], data: datasets.Dataset, transform: TrainTransform | None, size: dict[str, int]
) -> Iterator[Field]:
    """Sizes and objects of each image by itself."""
    collate = DetectionCollator(image_processor("gfl", size=size, antialias=False), transform)
    yield Field("order", [image["id"] for image in expected], data["image_id"][: len(expected)])
    for image, example in zip(expected, rows_of(data, [image["id"] for image in expected]), strict=True):
        batch = collate([example])
        (label,) = batch["labels"]
        height, width = shape = sizes_of(batch["pixel_mask"])[0]
        name = f"images[{image['id']}]"
        yield from unknown(name, image, IMAGE)
        ratios = [width / example["width"], height / example["height"]]
        yield Field(f"{name}.ori_shape", image["ori_shape"], label["orig_size"].tolist())
        yield Field(f"{name}.img_shape", image["img_shape"], shape)
        yield Field(f"{name}.scale_factor", image["scale_factor"], ratios, 1e-6)
        if "flip" in image:
            yield Field(f"{name}.flip", image["flip"], transform is not None and transform.flip == 1)
        # In the test pipeline annotations are loaded after the resize: boxes stay in pixels of the file.
        frame = (height, width) if transform is not None else (example["height"], example["width"])
        boxes = box_convert(label["boxes"].double(), "cxcywh", "xyxy") * torch.tensor([*frame[::-1], *frame[::-1]])
        yield from _objects(f"{name}.objects", image["objects"], boxes, label["class_labels"])
        record = make_record(example)
        crowds = select_objects(record, record["iscrowd"] == 1)
        crowds = crowds if transform is None else transform(crowds)
        yield from _objects(f"{name}.crowds", image["crowds"], crowds["boxes"].double(), crowds["labels"])


def _objects(name: str, expected: Case, boxes: Tensor, labels: Tensor) -> Iterator[Field]:
    yield Field(f"{name}.count", expected["count"], len(boxes))
    yield Field(f"{name}.labels", expected["labels"], labels[:LISTED].tolist())
    yield Field(f"{name}.first", expected["first"], boxes[:LISTED].tolist(), BOXES)
    off = BOXES * len(boxes) + 0.005  # sums have two decimals
    yield Field(f"{name}.sum", expected["sum"], numbers(boxes.sum(0)), off)


def _pixels(
    expected: list[Case], data: datasets.Dataset, transform: TrainTransform | None, edges: Sequence[int]
) -> Iterator[Field]:
    """Batches of two images: shape, statistics and samples of every kind of pixels, and priors that may be assigned."""
    for batch in expected:
        examples, batches = rows_of(data, batch["ids"]), {}
        for kind in [key for key in batch if re.fullmatch(r"[a-z]+_(rgb|bgr)_\d+", key)]:
            made = batches[kind] = DetectionCollator(processor_of(kind, edges), transform)(examples)
            yield from _kind(f"batches{batch['ids']}.{kind}", kind, batch[kind], made)
        if "valid_anchors" in batch:
            yield from _priors(f"batches{batch['ids']}", batch["valid_anchors"], batches["imagenet_rgb_32"])


def _kind(name: str, kind: str, expected: Case, made: dict[str, Any]) -> Iterator[Field]:
    statistics, order, divisor = kind.split("_")
    sample, mean = TOLERANCES[statistics]
    pixels = made["pixel_values"].flip(1) if order == "bgr" else made["pixel_values"]  # folded into the first layer
    sizes = sizes_of(made["pixel_mask"])
    yield Field(f"{name}.batch_input_shape", expected["batch_input_shape"], list(pixels.shape[-2:]))
    padded = [[math.ceil(edge / int(divisor)) * int(divisor) for edge in size] for size in sizes]
    yield Field(f"{name}.pad_shapes", expected["pad_shapes"], padded)
    empty = all(
        float(image[:, mask == 0].abs().sum()) == 0 for image, mask in zip(pixels, made["pixel_mask"], strict=True)
    )
    yield Field(f"{name}.padding_is_zero", expected["padding_is_zero"], empty)
    for index, (image, (height, width)) in enumerate(zip(pixels, sizes, strict=True)):
        own, published = image[:, :height, :width], expected["images"][index]
        yield from statistics_of(f"{name}.images[{index}]", published, own, sample, mean)


def statistics_of(name: str, published: Case, own: Tensor, sample: float, mean: float) -> Iterator[Field]:
    """Mean and deviation of each channel of an unpadded image (3, H, W), and 16 of its values."""
    flat = own.flatten(1).double()
    yield Field(f"{name}.mean", published["mean"], numbers(flat.mean(1)), mean)
    yield Field(f"{name}.std", published["std"], numbers(flat.std(1, correction=0)), mean)
    places = np.linspace(0, own.numel() - 1, len(published["samples"])).astype(int)
    yield Field(f"{name}.samples", published["samples"], numbers(own.flatten()[torch.from_numpy(places)]), sample)


def sizes_of(mask: Tensor) -> list[list[int]]:
    """(height, width) of each image of a batch."""
    return [[int(image.amax(1).sum()), int(image.amax(0).sum())] for image in mask]


@cache
def _detector(architecture: str) -> Any:
    return tiny(architecture)


def _priors(name: str, expected: Case, made: dict[str, Any]) -> Iterator[Field]:
    """Priors of each level, and those of each image that may be assigned."""
    canvas, sizes = made["pixel_values"].shape[-2:], torch.tensor(sizes_of(made["pixel_mask"]), dtype=torch.float32)
    for kind, published in expected.items():
        architecture = {"1": "gfl", "9": "retinanet", "3": "faster_rcnn"}[kind.split("_")[1]]
        model = _detector(architecture)
        shapes = [tuple(math.ceil(edge / stride) for edge in canvas) for stride in model.config.strides]
        if architecture == "faster_rcnn":
            priors = model.rpn.anchors([torch.empty(1, 1, *shape) for shape in shapes])
        else:
            priors = model.head.priors(shapes, torch.device("cpu"))
        levels = valid_priors(model.config, priors, sizes).split(priors.level_lengths, 1)
        valid = [[int(level[row].sum()) for level in levels] for row in range(len(sizes))]
        yield Field(f"{name}.{kind}.feature_sizes", published["feature_sizes"], [list(shape) for shape in shapes])
        yield Field(f"{name}.{kind}.anchors", published["anchors"], list(priors.level_lengths))
        yield Field(f"{name}.{kind}.valid", published["valid"], valid)


def _crops(expected: list[Case], data: datasets.Dataset) -> Iterator[Field]:
    """DETR's second branch, with the numbers that the authors drew: resize, crop, resize."""
    random_crop, processor = RandomCrop(), processor_of("imagenet_rgb_1", (800, 1333))
    for image, example in zip(expected, rows_of(data, [image["id"] for image in expected]), strict=True):
        name, place = f"images[{image['id']}]", image["crop"]
        record = make_record(example)
        listed = {**example["objects"], "iscrowd": [0] * len(record["boxes"])}  # crowd regions are cropped along
        record = clean_objects(select_objects(record, is_trained_on(listed)))
        first = resize(record, image["first_short_side"], random_crop.longest_edge, antialias=False)
        shape = first["image"].shape[-2:]
        yield Field(f"{name}.ori_shape", image["ori_shape"], list(record["image"].shape[-2:]))
        yield Field(f"{name}.first_shape", image["first_shape"], list(shape))
        for axis, key in enumerate(("crop_height_range", "crop_width_range")):
            yield Field(f"{name}.{key}", image[key], list(random_crop.range(shape[axis])))
        part = crop(first, place["top"], place["left"], place["height"], place["width"])
        yield Field(f"{name}.after_crop.count", image["boxes_after_crop"]["count"], len(part["boxes"]))
        listed = image["boxes_after_crop"]["first"]
        yield Field(f"{name}.after_crop.first", listed, part["boxes"][: len(listed)].tolist(), BOXES)
        last = resize(part, image["second_short_side"], 1333, antialias=False)
        height, width = last["image"].shape[-2:]
        yield Field(f"{name}.img_shape", image["img_shape"], [height, width])
        ratios = [width / place["width"], height / place["height"]]
        yield Field(f"{name}.scale_factor", image["scale_factor"], ratios, 1e-6)
        last = select_objects(last, last["iscrowd"] == 0)
        yield from _objects(f"{name}.objects", image["objects"], last["boxes"].double(), last["labels"])
        pixels = processor(images=[last["image"].as_subclass(Tensor)], do_resize=False, return_tensors="pt")
        yield from statistics_of(f"{name}.pixels", image["pixels"], pixels["pixel_values"][0], *TOLERANCES["imagenet"])


# ---- Filters and sampling ----


def filtered(data: DetectionData, settings: Case) -> list[int]:
    """Image ids that are left for training."""
    left = data.for_training(bool(settings.get("filter_empty_gt")), settings.get("min_size", 0))
    return list(left.dataset["image_id"])


def _filters(case: Case, coco: Path) -> Iterator[Field]:
    for name, published in case.items():
        if name in ("made", "batches", "note"):
            continue
        if "filter_cfg" not in published:
            yield Field(name, published, UNKNOWN)
            continue
        data = split_of(coco, name.partition(":")[0])
        ids = list(data.dataset["image_id"])
        left = filtered(data, published["filter_cfg"])
        yield Field(f"{name}.images", published["images"], len(ids))
        yield Field(f"{name}.left", published["left"], len(left))
        yield Field(f"{name}.dropped", published["dropped"], sorted(set(ids) - set(left)))
        yield Field(f"{name}.first", published["first"], left[: len(published["first"])])


def _made(made: Case) -> Iterator[Field]:
    with tempfile.TemporaryDirectory() as folder:
        data = _load(made["annotations"], Path(folder))
        yield Field("made.kept", made["kept"], filtered(data, made["filter_cfg"]))
        everything = filtered(data, {"filter_empty_gt": False})
        yield Field("made.kept_without_filter_of_empty_images", made["kept_without_filter_of_empty_images"], everything)
        for example in data.dataset:
            key = str(example["image_id"])
            if key in made["instances"]:
                yield Field(f"made.instances.{key}", _clipped(made["instances"][key], example), _instances(example))
        for key in [key for key in made if key.startswith("kept_with_one_class_")]:
            yield Field(f"made.{key}", made[key], _kept_with(made, key.rpartition("_")[2], Path(folder)))


def _load(content: Case, folder: Path) -> DetectionData:
    for image in content["images"]:
        Image.new("RGB", (image["width"], image["height"])).save(folder / image["file_name"])
    (folder / "annotations.json").write_text(json.dumps(content))
    return load_coco(folder / "annotations.json", folder)


def _kept_with(made: Case, name: str, folder: Path) -> list[int]:
    """What is left of the file if one class is wanted: the annotations of the others are not there."""
    content = made["annotations"]
    wanted = [category for category in content["categories"] if category["name"] == name]
    objects = [entry for entry in content["annotations"] if entry["category_id"] == wanted[0]["id"]]
    data = _load(content | {"categories": wanted, "annotations": objects}, folder)
    return filtered(data, made["filter_cfg"])


def _instances(example: dict[str, Any]) -> list[Case]:
    """Objects that are trained on, and crowd regions, in the order of the file; boxes end at the edge of the image."""
    objects = example["objects"]
    record = make_record(example)
    boxes, crowd = record["boxes"], record["iscrowd"] == 1
    keep = is_trained_on({**objects, "iscrowd": [0] * len(boxes)})
    limits = torch.tensor([example["width"], example["height"]] * 2)
    boxes = boxes.as_subclass(Tensor).clamp(min=0).minimum(limits)
    keep &= (boxes[:, 2:] > boxes[:, :2]).all(1)
    rows = zip(boxes[keep].tolist(), record["labels"][keep].tolist(), crowd[keep].tolist(), strict=True)
    return [{"box_xyxy": box, "label": label, "crowd": is_crowd} for box, label, is_crowd in rows]


def _clipped(instances: list[Case], example: dict[str, Any]) -> list[Case]:
    """The authors' boxes are clipped after the resize, ours before."""
    limits = np.array([example["width"], example["height"]] * 2)
    return [entry | {"box_xyxy": np.clip(entry["box_xyxy"], 0, limits).tolist()} for entry in instances]


def _batches(expected: Case, coco: Path) -> Iterator[Field]:
    data = split_of(coco, "train2017").for_training(drop_empty=True, min_size=32).dataset
    portrait = [width < height for width, height in zip(data["width"], data["height"], strict=True)]
    ids = data["image_id"]
    for name, published in expected.items():
        count = int(name.split()[-1])
        made = batches_of_one_orientation(range(len(ids)), portrait.__getitem__, count)
        batches = [[ids[index] for index in batch] for batch in made]
        yield Field(f"{name}.batches", published["batches"], batches)
        yield Field(f"{name}.length", published["length"], len(batches))
