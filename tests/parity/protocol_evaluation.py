"""Average precision of given detections: the evaluator of this library beside MMDetection's and pycocotools'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from crosskd_hf.data import load_coco
from crosskd_hf.data.dataset import DetectionData
from crosskd_hf.inference.coco_evaluator import SUMMARY, CocoEvaluator
from tests.parity.protocol_fields import Field, unknown

COLUMNS = ["image_id", "category_id", "score", "x1", "y1", "x2", "y2"]
KNOWN = {
    *("case", "dataset", "note", "names", "count", "differ", "detections", "detections_columns"),
    *("mmdet", "pycocotools"),
}
PRINTED = 1e-6  # of stats, which have six decimals
REPORTED = 6e-4  # of what is published, which has three


def split_of(coco: Path, name: str) -> DetectionData:
    """A split of `coco_tiny` with the classes of both.

    Raises:
        FileNotFoundError: The folder isn't there.
    """
    annotations = coco / "annotations" / f"instances_{name}.json"
    if not annotations.is_file():
        raise FileNotFoundError(f"there is no {annotations}: give the folder of coco_tiny with --coco")
    return load_coco(annotations, coco / name, decode=False)


def compare(case: dict[str, Any], coco: Path) -> list[Field]:
    """COCO's twelve numbers, and the six that MMDetection reports."""
    data = split_of(coco, case["dataset"].split()[-1])
    evaluator = CocoEvaluator(data.dataset, data.categories)
    rows: dict[int, list[list[float]]] = {image_id: [] for image_id in data.dataset["image_id"]}
    for image_id, *row in case["detections"]:
        rows[image_id].append(row)
    for image_id, found in rows.items():
        columns = torch.tensor(found, dtype=torch.float64).reshape(-1, 6)
        labels = torch.tensor([data.categories.to_contiguous(int(raw)) for raw in columns[:, 0]], dtype=torch.int64)
        evaluator.update([image_id], [{"labels": labels, "scores": columns[:, 1], "boxes": columns[:, 2:]}])
    evaluator.compute()
    fields = [*unknown("", case, KNOWN), Field("detections_columns", case["detections_columns"], COLUMNS)]
    fields.append(Field("count", case["count"], sum(len(found) for found in evaluator.rows.values())))
    pairs = zip(case["names"], case["pycocotools"]["stats"], evaluator.stats, strict=True)
    fields += [Field(f"pycocotools.{name}", published, ours, PRINTED) for name, published, ours in pairs]
    # With more than 100 detections of one class in an image MMDetection counts up to 1000 of them, COCO's rule is 100.
    equal = [name not in case["differ"] for name in case["names"][: len(SUMMARY)]]
    for index, (name, published) in enumerate(case["mmdet"]["reported"].items()):
        if equal[index]:
            fields.append(Field(f"mmdet.{name}", published, evaluator.stats[index], REPORTED))
            fields.append(Field(f"mmdet.stats.{name}", case["mmdet"]["stats"][index], evaluator.stats[index], PRINTED))
    return fields
