"""The transforms of a published configuration: sizes, flip and crop; every other word of them has to be known."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests.parity.protocol_fields import UNKNOWN, Field

Case = dict[str, Any]
# The values that keys of a step may have; None: any, because it is read.
STEPS: dict[str, dict[str, Any]] = {
    "LoadImageFromFile": {},
    "LoadAnnotations": {"with_bbox": True},
    "Resize": {"scale": None, "keep_ratio": True},
    "RandomChoiceResize": {"scales": None, "scale": None, "keep_ratio": True},
    "RandomResize": {"scale": None, "keep_ratio": True},
    "RandomFlip": {"prob": None},
    "RandomChoice": {"transforms": None},
    "RandomCrop": {"crop_type": "absolute_range", "crop_size": None, "allow_negative_crop": True},
    "PackDetInputs": {"meta_keys": None},
}


@dataclass
class Augmentation:
    """What the transforms do to an image.

    Args:
        shortest: Lengths in px, one of which is drawn for the shorter side.
        longest: Limit of the longer side in px.
        flip: Probability of the horizontal flip.
        crop: Sizes of the other branch, which is taken by half of the images.
    """

    shortest: list[int]
    longest: int
    flip: float
    crop: Case | None


def read_steps(name: str, steps: list[Case]) -> tuple[Augmentation, list[Field]]:
    """What the transforms do, and the words of them that are not known."""
    odd = list(_unknown(name, steps))
    flips = [step["prob"] for step in steps if step["type"] == "RandomFlip"]
    branches = [step["transforms"] for step in steps if step["type"] == "RandomChoice"]
    flat, crop = [step for step in steps if "Resize" in step["type"]], None
    for whole, part in branches:  # of the whole image, and of a crop
        flat += [step for step in whole if "Resize" in step["type"]]
        sizes = [sorted(scale) for scale in _scales(part[0])]
        crop = {
            "shortest_edges": sorted(size[0] for size in sizes),
            "longest_edge": max(size[1] for size in sizes),
            "size": part[1]["crop_size"],
        }
        odd.append(Field(f"{name}.last_resize", _scales(whole[-1]), _scales(part[-1])))
    odd.append(Field(f"{name}.resizes", 1, len(flat)))
    sizes = [sorted(scale) for scale in _scales(flat[0])]
    shortest = sorted(size[0] for size in sizes)
    if flat[0]["type"] == "RandomResize":  # every length from one to the other
        shortest = list(range(shortest[0], shortest[-1] + 1))
    return Augmentation(shortest, max(size[1] for size in sizes), flips[0] if flips else 0.0, crop), odd


def _scales(step: Case) -> list[Any]:
    scales = step.get("scales") or step["scale"]
    return scales if isinstance(scales[0], list) else [scales]


def _unknown(name: str, steps: list[Case]) -> Iterator[Field]:
    for index, step in enumerate(steps):
        known = STEPS.get(step["type"])
        place = f"{name}[{index}]"
        if known is None:
            yield Field(f"{place}.type", step["type"], UNKNOWN)
            continue
        for key, value in step.items():
            if key not in ("type", *known):
                yield Field(f"{place}.{key}", value, UNKNOWN)
            elif known.get(key) is not None:
                yield Field(f"{place}.{key}", value, known[key])
        for number, branch in enumerate(step.get("transforms", [])):
            yield from _unknown(f"{place}.transforms[{number}]", branch)
