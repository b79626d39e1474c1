"""Scores at locations, conflicts, heat maps and gradients: their values on pairs whose answer is known."""

import copy
import csv
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from crosskd_hf.analysis import conflict, curves, gradients, nms, targets
from crosskd_hf.analysis.pictures import inside, overlay
from crosskd_hf.analysis.probe import FOREGROUND, LocationScores, Probe, batches
from crosskd_hf.create import Detector
from crosskd_hf.data.dataset import DetectionData
from crosskd_hf.distillation import Distiller
from crosskd_hf.models import DETECTORS, DetectionImageProcessor, FasterRCNNConfig
from tests.tiny_dense import KINDS, make_batch, make_detector
from tests.tiny_run import load_data, make_data

NAMES = dict(enumerate(("circle", "square", "triangle", "star")))
NAMED: dict[str, Any] = {"num_labels": 4, "id2label": NAMES, "label2id": {name: i for i, name in NAMES.items()}}


def detector(kind: str = "gfl", seed: int = 0, **changes: Any) -> Detector:
    """A tiny detector that knows the classes of the shapes."""
    processor = DetectionImageProcessor(size={"shortest_edge": 64, "longest_edge": 64}, score_threshold=0.0)
    return Detector(make_detector(kind, seed, **NAMED | changes).eval(), processor)


def scores(labels: Tensor, teacher: Tensor, student: Tensor | None = None) -> LocationScores:
    """One image with one level of so many locations."""
    own = teacher if student is None else student
    valid = torch.ones(labels.shape[:2], dtype=torch.bool)
    return LocationScores(labels, own, teacher, own, valid, ((1, labels.shape[1]),))


def rows_of(path: Path) -> list[dict[str, str]]:
    """Of a csv file."""
    with path.open(newline="") as file:
        return [*csv.DictReader(file)]


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> tuple[DetectionData, DetectionData]:
    """Seven and five images of shapes; training images 2 and 3 have no objects."""
    folder = tmp_path_factory.mktemp("shapes")
    make_data(folder)
    return load_data(folder)


@pytest.fixture(scope="module")
def val(splits: tuple[DetectionData, DetectionData]) -> DetectionData:
    """Five images of shapes."""
    return splits[1]


class TestProbe:
    @pytest.mark.parametrize("kind", KINDS)
    def test_a_student_that_is_its_teacher_agrees_with_it(self, kind: str) -> None:
        own = detector(kind)
        with Probe(own, Detector(copy.deepcopy(own.model), own.processor)) as probe:
            found = probe.scores(make_batch(((64, 64), (24, 30)), num_labels=4))
        torch.testing.assert_close(found.student, found.teacher)
        torch.testing.assert_close(found.cross, found.teacher, atol=1e-5, rtol=1e-5)
        assert found.labels.sum() > 0
        assert set(found.labels.unique().tolist()) == {0.0, 1.0}
        assert found.labels.shape == found.teacher.shape == (2, sum(h * w for h, w in found.shapes), 4)
        assert found.valid[0].all()
        assert bool(found.valid[1].all()) is (kind == "fcos")  # which is trained on all of the padding

    def test_heads_of_different_kinds_have_the_same_locations(self) -> None:
        with Probe(detector("gfl"), detector("retinanet", 1)) as probe:
            found = probe.scores(make_batch(num_labels=4))
        assert found.student.shape == found.teacher.shape == found.cross.shape == found.labels.shape

    def test_other_families_are_refused(self) -> None:
        config = FasterRCNNConfig(backbone="test_resnet", fpn_channels=16, **NAMED)
        models = [DETECTORS[FasterRCNNConfig](config) for _ in range(2)]
        student, teacher = (Detector(model, detector().processor) for model in models)
        with pytest.raises(ValueError, match="shows scores at the locations of dense detectors"):
            Probe(student, teacher)

    def test_other_widths_need_trained_adapters(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="cross-head predictions need the adapters"):
            Probe(detector(head_channels=8, fpn_channels=8), detector(seed=1), tmp_path / "distiller.safetensors")

    def test_data_without_objects_is_refused(self, splits: tuple[DetectionData, DetectionData]) -> None:
        empty = dataclasses.replace(splits[0], dataset=splits[0].dataset.select([2, 3]))
        with pytest.raises(ValueError, match="No image of the data has an object"):
            [*batches(detector(), empty, 3)]


class TestConflict:
    def test_equal_targets_have_none(self) -> None:
        labels = torch.tensor([[[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]]])
        counts, seen = conflict.conflicts(scores(labels, labels))
        assert counts.sum() == 0
        assert seen == 2

    def test_counts_by_the_threshold(self) -> None:
        labels = torch.tensor([[[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]])
        teacher = torch.tensor([[[0.7, 0.0], [0.0, 0.5], [0.0, FOREGROUND / 2]]])  # the last is background for both
        counts, seen = conflict.conflicts(scores(labels, teacher), (0.0, 0.25, 0.4, 0.6))
        assert counts.tolist() == [2, 2, 1, 0]
        assert seen == 2

    def test_files(self, val: DetectionData, tmp_path: Path) -> None:
        teachers = {"gfl": detector(seed=1), "fcos": detector("fcos", 2)}
        picture, table = conflict.conflict(detector(), teachers, val, tmp_path, 3)
        rows = rows_of(table)
        assert picture.stat().st_size > 5000
        assert {row["teacher"] for row in rows} == {"gfl", "fcos"}
        shares = [float(row["share"]) for row in rows if row["teacher"] == "gfl"]
        assert shares == sorted(shares, reverse=True)
        assert 0 < shares[0] <= 1


class TestTargets:
    def test_distances(self) -> None:
        labels, teacher = torch.tensor([[[1.0], [0.0]]]), torch.tensor([[[0.6], [0.2]]])
        found = scores(labels, teacher, student=torch.tensor([[[0.9], [0.1]]]))
        rows = {row["column"]: row for row in targets.distances(found, targets.columns(found, None), 0)}
        assert rows["labels"]["l1_to_labels"] == 0
        assert rows["teacher"]["l1_to_labels"] == pytest.approx(0.3)  # mean of .4 and .2
        assert rows["student's own"]["l1_to_labels"] == pytest.approx(0.1)
        assert rows["student's own"]["l1_to_teacher"] == pytest.approx(0.2)  # mean of .3 and .1

    def test_files(self, val: DetectionData, tmp_path: Path) -> None:
        picture, table = targets.targets(detector(), detector(seed=1), val, tmp_path, 2, plain=detector(seed=2))
        rows = rows_of(table)
        assert picture.stat().st_size > 5000
        names = ["labels", "teacher", "student's own", "plain KD", "CrossKD (cross-head)"]
        assert [row["column"] for row in rows] == names * 2
        assert all(float(row["l1_to_teacher"]) == 0 for row in rows if row["column"] == "teacher")


class TestGradients:
    @pytest.mark.parametrize("kind", ["gfl", "retinanet"])
    def test_a_student_that_is_its_teacher_is_not_moved(self, kind: str) -> None:
        own = detector(kind)
        methods = ["pkd", "crosskd:beta=0,terms.reg=0"]  # focal loss and GIoU have a kink at equality
        with Distiller(own.model, copy.deepcopy(own.model), methods) as distiller:
            _, equal = gradients.feature_gradients(distiller, make_batch(num_labels=4))
        with Distiller(own.model, detector(kind, 3).model, methods) as distiller:
            _, other = gradients.feature_gradients(distiller, make_batch(num_labels=4))
        for name in ("pkd", "crosskd"):
            assert sum(level.sum() for level in other[name]) > 0
            assert sum(level.sum() for level in equal[name]) < 1e-4 * sum(level.sum() for level in other[name])

    def test_share_inside(self) -> None:
        norms = [torch.tensor([[3.0, 1.0], [0.0, 4.0]])]
        boxes = torch.tensor([[0.0, 0.0, 8.0, 8.0]])
        assert gradients.share_inside(norms, boxes, [8], (16, 16)) == [3 / 8, 1 / 4]
        assert gradients.share_inside(norms, boxes, [8], (8, 16)) == [3 / 4, 1 / 2]  # the second row is padding

    def test_files(self, val: DetectionData, tmp_path: Path) -> None:
        picture, table = gradients.gradients(detector(), detector(seed=1), val, tmp_path, 2, ("fgd", "crosskd"))
        rows = rows_of(table)
        assert picture.stat().st_size > 5000
        assert [row["method"] for row in rows] == ["fgd", "crosskd"] * 2
        assert all(0 <= float(row[name]) <= 1 for row in rows for name in ("gradient_in_boxes", "area_of_boxes"))


class TestCurves:
    def test_distances_are_means_over_the_locations_of_all_batches(self) -> None:
        first = scores(torch.tensor([[[1.0]]]), torch.tensor([[[0.5]]]), torch.tensor([[[0.8]]]))
        second = scores(torch.tensor([[[0.0], [1.0]]]), torch.tensor([[[0.1], [1.0]]]), torch.tensor([[[0.0], [0.9]]]))
        found = curves.mean_distances([first, second])
        assert found["l1_to_teacher"] == pytest.approx((0.3 + 0.1 + 0.1) / 3)
        assert found["l1_to_labels"] == pytest.approx((0.2 + 0.0 + 0.1) / 3)

    def test_a_row_after_every_evaluation(self, val: DetectionData, tmp_path: Path) -> None:
        own = detector()
        own.model.train()
        inputs = [*batches(own, val, 2)]
        teacher = Detector(copy.deepcopy(own.model).eval(), own.processor)
        callback = curves.DistanceCurves(own.processor, teacher, inputs, tmp_path / "distances.csv")

        class State:
            is_world_process_zero, epoch, global_step = True, 1.0, 5

        own.model.eval()
        callback.on_evaluate(None, State(), None, model=own.model, metrics={"eval_map": 0.25})
        (row,) = rows_of(tmp_path / "distances.csv")
        assert float(row["l1_to_teacher"]) < 1e-6
        assert float(row["l1_to_labels"]) > 0
        assert float(row["ap"]) == 25


class TestNms:
    def test_a_higher_threshold_keeps_more(self, tmp_path: Path, val: DetectionData) -> None:
        from crosskd_hf.inference.files import find_images

        val.dataset[0]["image"].save(tmp_path / "a.png")
        picture, table = nms.side_by_side(detector(), find_images(tmp_path), tmp_path / "out", [0.1, 0.6, 1.0], 0.2)
        counts = [sum(float(row["nms"]) == each for row in rows_of(table)) for each in (0.1, 0.6, 1.0)]
        assert 0 < counts[0] <= counts[1] <= counts[2]
        assert counts[0] < counts[2]
        assert picture.stat().st_size > 5000

    def test_what_has_no_nms_is_refused(self) -> None:
        class Without:
            pass

        with pytest.raises(ValueError, match="has no NMS"):
            nms.with_nms(Detector(detector().model, Without()), 0.5)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="must lie in"):
            nms.with_nms(detector(), 1.5)


def test_cells_are_inside_by_their_centre() -> None:
    found = inside(torch.tensor([[0.0, 0.0, 12.5, 4.5]]), (2, 4), 8)
    assert found.tolist() == [[True, True, False, False], [False] * 4]
    assert not inside(torch.zeros(0, 4), (2, 2), 8).any()


def test_an_overlay_is_the_highest_of_all_levels() -> None:
    fine, coarse = torch.tensor([[0.1, 0.2], [0.3, 0.4]]), torch.tensor([[0.25]])
    assert (
        overlay([fine, coarse], (4, 4), (4, 3)).tolist()
        == torch.tensor([[0.25, 0.25, 0.25], [0.25, 0.25, 0.25], [0.3, 0.3, 0.4], [0.3, 0.3, 0.4]]).tolist()
    )


def test_a_density_adds_up_to_the_sum_of_all_cells() -> None:
    fine, coarse = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[6.0]])
    found = overlay([fine, coarse], (4, 4), (4, 4), density=True)
    assert found.sum().item() == pytest.approx(16)
    assert found[0, 0].item() == pytest.approx(1 / 4 + 6 / 16)
