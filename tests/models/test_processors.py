"""One table of image processors: the converter, new models and the command line give the same one."""

import pytest

from crosskd_hf.create import ARCHITECTURES, DetectorSpec
from crosskd_hf.models import FCOSConfig, image_processor
from crosskd_hf.models.processors import POST_PROCESSING

PUBLISHED = {"gfl": 0.6, "atss": 0.6, "tood": 0.6, "retinanet": 0.5, "fcos": 0.5, "faster_rcnn": 0.5}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nms_as_published(architecture: str) -> None:
    assert DetectorSpec(architecture).image_processor().nms_threshold == PUBLISHED[architecture]
    assert image_processor(ARCHITECTURES[architecture]).nms_threshold == PUBLISHED[architecture]


def test_every_architecture_is_listed() -> None:
    assert POST_PROCESSING.keys() == {*ARCHITECTURES, "deformable_detr"}


def test_what_is_given_wins() -> None:
    assert image_processor(FCOSConfig(), nms_threshold=0.7).nms_threshold == 0.7


def test_caffe_pixels_in_rgb() -> None:
    processor = DetectorSpec("fcos", fields=(("caffe_stride", True),)).image_processor()
    assert [255 * mean for mean in processor.image_mean] == pytest.approx([122.7717, 115.9465, 102.9801])
    assert [255 * std for std in processor.image_std] == pytest.approx([1, 1, 1])


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(ValueError, match="No image processor is known for 'yolo': choose one of atss"):
        image_processor("yolo")
