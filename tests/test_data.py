import pytest
import torch
from transformers import DeformableDetrImageProcessor, RTDetrImageProcessor

from crosskd_hf.data import DetectionCollator, load_coco
from crosskd_hf.shapes import make_shapes


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    paths = make_shapes(tmp_path_factory.mktemp("shapes"), num_train=8, num_val=2, size=96)
    return load_coco(paths.train_annotations, paths.train_images)


def whole_image_example(width, height, **objects):
    import PIL.Image

    fields = {"id": [1], "bbox": [[0.0, 0, width, height]], "category": [0], "area": [1.0], "iscrowd": [0]}
    image = PIL.Image.new("RGB", (width, height))
    return {"image": image, "image_id": 3, "width": width, "height": height, "objects": {**fields, **objects}}


class TestDetectionCollator:
    def test_batch_has_the_shapes_and_types_of_hf_models(self, shapes):
        processor = DeformableDetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})
        batch = DetectionCollator(processor)([shapes.dataset[i] for i in range(4)])
        assert batch["pixel_values"].shape[:2] == (4, 3)
        assert batch["pixel_mask"].shape == (4, *batch["pixel_values"].shape[2:])
        assert batch["pixel_mask"].dtype == torch.int64
        assert [label["image_id"].item() for label in batch["labels"]] == shapes.dataset["image_id"][:4]
        for label in batch["labels"]:
            assert label["class_labels"].dtype == torch.int64
            assert label["boxes"].shape == (len(label["class_labels"]), 4)

    @pytest.mark.parametrize("processor_class", [DeformableDetrImageProcessor, RTDetrImageProcessor])
    def test_boxes_are_relative_to_the_unpadded_image(self, processor_class):
        examples = [whole_image_example(60, 40), whole_image_example(40, 60)]
        batch = DetectionCollator(processor_class(size={"height": 64, "width": 64}))(examples)
        padded = DetectionCollator(DeformableDetrImageProcessor(size={"shortest_edge": 32, "longest_edge": 64}))(examples)
        for label in (*batch["labels"], *padded["labels"]):
            torch.testing.assert_close(label["boxes"], torch.tensor([[0.5, 0.5, 1, 1]]))
        assert padded["pixel_values"].shape[2:] == (48, 48)
        assert padded["labels"][0]["orig_size"].tolist() == [40, 60]
