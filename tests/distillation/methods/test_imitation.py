"""FitNets, inside-GT and main region: which locations count, and the figures of LD's code."""

import math

import pytest
import torch

from crosskd_hf.distillation import FitNets, InsideGT, MainRegion, MethodConfig
from crosskd_hf.distillation.passes import Batch, FeatureMap, Pair, Pass, rows_of_levels
from crosskd_hf.distillation.regions import centers, inside_boxes, positives
from crosskd_hf.models.assigners import Targets
from crosskd_hf.models.boxes import to_relative
from crosskd_hf.models.losses import divide
from tests.distillation.stubs import STRIDES, MapsView, build_method, empty_batch, maps_pass
from tests.golden.methods import seeded_methods as sm
from tests.tiny_dense import make_detector


class TestRegions:
    FEATURE = FeatureMap(8, torch.zeros(1, 2, 3, 4))

    def test_centers_of_cells(self) -> None:
        points = centers(self.FEATURE, Pass())
        assert points.shape == (12, 2)
        assert points[0].tolist() == [4, 4]
        assert points[-1].tolist() == [28, 20]

    def test_a_center_on_the_border_of_a_box_is_outside(self) -> None:
        boxes = torch.tensor([[[4.0, 4, 20, 20], [0, 0, 100, 100]]])
        targets = Targets(boxes, torch.zeros(1, 2, dtype=torch.long), torch.tensor([[True, False]]))
        inside = inside_boxes(centers(self.FEATURE, Pass()), targets).view(3, 4)
        assert inside.nonzero().tolist() == [[1, 1]]

    def test_no_box_no_location(self) -> None:
        targets = Targets.from_labels(
            [{"class_labels": torch.zeros(0).long(), "boxes": torch.zeros(0, 4)}], torch.ones(1, 2)
        )
        assert not inside_boxes(centers(self.FEATURE, Pass()), targets).any()

    def test_any_of_several_anchors_makes_a_location_positive(self) -> None:
        head = make_detector("retinanet").head
        priors = head.priors([(3, 4), (2, 2), (1, 1), (1, 1), (1, 1)], torch.device("cpu"))
        own = Pass(priors=priors, rows=rows_of_levels(head.config.strides, priors))
        positive = torch.zeros(1, len(priors.boxes), dtype=torch.bool)
        positive[0, 9 * 5 + 3] = True
        weight = positive.float()
        own.assignment = type("A", (), {"positive": positive, "weight": weight})  # type: ignore[assignment]
        assert positives(self.FEATURE, own).nonzero().tolist() == [[0, 1, 1]]
        assert torch.equal(centers(self.FEATURE, own), priors.centers[: 9 * 12 : 9])


def test_levels_are_means_that_are_added_up() -> None:
    student, teacher = ([torch.randn(2, 3, n, n) for n in (4, 2)] for _ in range(2))
    method = build_method(FitNets(adapter=False), 3, 3, 2)
    loss = divide(method(maps_pass(student), maps_pass(teacher), empty_batch(2)))["features"]
    expected = sum((s - t).square().mean() for s, t in zip(student, teacher, strict=True))
    torch.testing.assert_close(loss, expected)


def test_other_widths_need_an_adapter() -> None:
    with pytest.raises(ValueError, match="adapter=False, but the student's features are 2 wide and the teacher's 3"):
        build_method(FitNets(adapter=False), 2, 3)
    assert len(list(build_method(FitNets(), 2, 3).parameters())) == 10


# What LD's code printed (HikariTJU/LD 4287990) for the seeded cases of tests/golden/methods: weight 2, no adapter.
LD = {
    "normal": (2.66299295, 2.65135634, 6.63941944),
    "empty": (1.30327451, 1.29354978, 6.57500911),
    "tiny": (1.28015757, 1.28015757, 6.62205708),
    "crowded": (2.66071284, 2.69222021, 6.70888638),
}
CONFIGS: tuple[MethodConfig, ...] = (
    InsideGT(positive_levels=True),
    MainRegion(),
    FitNets(preset="ld"),
)


def gfl_pass(case: dict, batch: Batch, maps: list[torch.Tensor]) -> Pass:
    """Maps with the priors of a GFL head and what they are trained on."""
    head, found = make_detector("gfl").head, maps_pass(maps)
    found.priors = head.priors([tuple(values.shape[-2:]) for values in maps], torch.device("cpu"))
    found.rows = rows_of_levels(STRIDES, found.priors)
    empty = torch.zeros(0)
    found.assignment = head.assign(found.priors, found.priors.inside(batch.sizes), batch.targets, empty, empty)
    return found


@pytest.mark.parametrize("name", LD)
def test_figures_of_ld(name: str) -> None:
    case = sm.CASES[name]
    sizes = torch.tensor([[math.ceil(edge / 32) * 32 for edge in shape] for shape in case["image_shapes"]]).float()
    sizes = torch.minimum(sizes, torch.tensor(case["pad_shape"]).float())
    mask = torch.zeros(len(sizes), *case["pad_shape"])
    for image, (height, width) in zip(mask, sizes.int().tolist(), strict=True):
        image[:height, :width] = 1
    labels = [
        {"class_labels": target["labels"], "boxes": to_relative(target["boxes"][None], size[None])[0]}
        for target, size in zip(sm.seeded_boxes(case, 12), sizes, strict=True)
    ]
    batch = Batch(torch.zeros(len(sizes), 3, *case["pad_shape"]), mask, labels)
    student = gfl_pass(case, batch, sm.seeded_features(case, "student", 256))
    teacher = maps_pass(sm.seeded_features(case, "teacher", 256))
    for config, expected in zip(CONFIGS, LD[name], strict=True):
        pair = Pair(MapsView(256), MapsView(256, "teacher"))
        pair.student.offers = frozenset({"features", "priors", "assignment"})
        method = config.method(config.published(pair), *pair)
        loss = method.config.weight * divide(method(student, teacher, batch))["features"]
        assert loss.item() == pytest.approx(expected, rel=1e-4), config
