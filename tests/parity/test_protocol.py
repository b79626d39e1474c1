"""The authors' figures around the losses: post-processing, pipeline, evaluation, configurations (`protocol.py`)."""

import json
from pathlib import Path

import pytest

from tests.parity import protocol

GOLDEN = Path(__file__).parents[1] / "golden" / "protocol"
QUICK = [
    *("postprocess/retinanet_c", "postprocess/deformable_detr", "postprocess/roi", "postprocess/rpn_c"),
    *("configs/crosskd_gfl_r18_from_r50_1x", "configs/deformable_detr_r18_50e"),
    *("configs/crosskd_faster_rcnn_r18_from_r50_1x", "configs/crosskd_fcos_r50_from_r101_caffe_ms_2x"),
]
WITH_IMAGES = ["evaluation/evaluation_few_images", "pipeline/train_1333x480_noflip", "pipeline/filter_and_batches"]
with_images = pytest.mark.skipif(
    not protocol.COCO.is_dir(), reason=f"the images of coco_tiny are not in {protocol.COCO}"
)


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=with_images) for name in WITH_IMAGES)])
def test_a_file(name: str) -> None:
    assert protocol.run(GOLDEN / f"{name}.json")


def test_a_wrong_figure_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = json.loads((GOLDEN / "postprocess" / "deformable_detr.json").read_text())
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(case | {"test_cfg": {"max_per_img": 99}}))
    assert not protocol.run(changed)
    assert "test_cfg.max_per_img: 99 published, 100 here" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["postprocess/deformable_detr", pytest.param(WITH_IMAGES[0], marks=with_images)])
def test_an_unknown_key_is_named(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(json.loads((GOLDEN / f"{name}.json").read_text()) | {"soft_nms": 0.5}))
    assert not protocol.run(changed)
    assert "soft_nms: 0.5 published, a key that this comparison does not know here" in capsys.readouterr().out


def test_a_file_of_no_known_kind_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.json").write_text('{"thing": 1}')
    assert not protocol.run(tmp_path / "other.json")
    assert "no known kind of file" in capsys.readouterr().out
