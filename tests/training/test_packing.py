"""Labels go to the device in one copy, and arrive as they were."""

from __future__ import annotations

import pickle
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import DataLoader

from benchmarks.step_kernels import KernelCount
from crosskd_hf.training.packing import PackedLabels, Packing
from tests.versions import needs_fake_gpu


def labels(images: int = 3) -> list[dict[str, Any]]:
    """As a collator makes them: numbers of several sizes, an image without objects, and a name."""
    return [
        {
            "boxes": torch.rand(number, 4),
            "iscrowd": torch.zeros(number, dtype=torch.bool),
            "class_labels": torch.arange(number),
            "image_id": torch.tensor(number),
            "size": torch.tensor([480, 640]),
            "name": f"image {number}",
        }
        for number in range(images)
    ]


def equal(left: list[dict[str, Any]], right: list[dict[str, Any]]) -> bool:
    pairs = [(a[name], b[name]) for a, b in zip(left, right, strict=True) for name in a]
    return all(torch.equal(a, b) and a.dtype == b.dtype if torch.is_tensor(a) else a == b for a, b in pairs)


def test_labels_are_the_same_after_the_copy() -> None:
    given = labels()
    copied = PackedLabels(given)._through(torch.clone)
    assert equal(given, copied)
    assert len({tensor.untyped_storage().data_ptr() for tensor in copied[1].values() if torch.is_tensor(tensor)}) == 1


@needs_fake_gpu
def test_one_copy_takes_a_batch_to_the_device() -> None:
    with FakeTensorMode():
        given = labels()
        with KernelCount() as one_by_one:
            send_to_device(given, torch.device("cuda"))
        with KernelCount() as packed:
            moved = send_to_device(PackedLabels(given), torch.device("cuda"))
    assert len(one_by_one.copies) == 15
    assert len(packed.copies) == 1
    assert {tensor.device.type for tensor in moved[2].values() if isinstance(tensor, torch.Tensor)} == {"cuda"}


def test_labels_that_are_there_already_stay() -> None:
    packed = PackedLabels(labels())
    assert packed.to("cpu") is packed
    assert PackedLabels([{"name": "nothing"}])._through(torch.clone) == [{"name": "nothing"}]


def test_a_loader_with_workers_hands_them_on() -> None:
    collate = Packing(lambda examples: {"pixel_values": torch.zeros(len(examples), 3), "labels": list(examples)})
    (batch,) = DataLoader(labels(), 3, collate_fn=collate, num_workers=0)  # type: ignore[arg-type]
    assert isinstance(batch["labels"], PackedLabels)
    assert isinstance(pickle.loads(pickle.dumps(batch["labels"])), PackedLabels)


def test_other_batches_stay_as_they_are() -> None:
    for batch in ({"labels": torch.zeros(3)}, {"pixel_values": 1}, [1, 2]):
        assert Packing(lambda _, batch=batch: batch)([]) is batch
