"""The check of a pair before training."""

import copy
from pathlib import Path

import pytest
import torch

from crosskd_hf.data import DetectionData, load_coco
from crosskd_hf.data.sampling import ByShape
from crosskd_hf.data.shapes import make_shapes
from crosskd_hf.distillation import CrossKD
from crosskd_hf.experiments.check_pair import PairReport, check_pair, teacher_ap
from crosskd_hf.models import DenseDetector, DetectionImageProcessor
from crosskd_hf.models.boxes import to_relative
from crosskd_hf.models.dense import DenseDetectorOutput
from tests.tiny_dense import make_detector

SIZE = {"height": 64, "width": 64}
CAFFE = {"channel_order": "bgr", "rescale_factor": 1.0, "image_mean": [102.98, 115.95, 122.77], "image_std": [1.0] * 3}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> DetectionData:
    paths = make_shapes(tmp_path_factory.mktemp("shapes"), 2, 5, 64)
    return load_coco(paths.val_annotations, paths.val_annotations.parent.parent / "val")


def names(model: DenseDetector, *classes: str) -> DenseDetector:
    model.config.id2label = dict(enumerate(classes))
    return model


class TestGoodPairs:
    def test_report(self) -> None:
        student, teacher = make_detector("gfl"), make_detector("retinanet", seed=1, head_channels=24)
        for model in (student, teacher):
            names(model, "cow", "cat", "dog")
        processors = DetectionImageProcessor(size=SIZE), DetectionImageProcessor(size=SIZE, **CAFFE)
        report = check_pair(student, teacher, ["crosskd"], *processors)
        assert report.ok
        assert report.student.startswith("GFL (test_resnet, 3 classes, 0.")
        assert report.distillation["methods"]["crosskd"]["cut"] == 3
        assert report.distillation["adapters"]["crosskd.adapters.cls.weight"] == [24, 16, 1, 1]
        assert report.classes == "3 classes shared by name"
        assert "converted from RGB mean (0.485" in report.pixels
        assert "to BGR mean (103" in report.pixels
        assert report.warnings == ()
        assert report.teacher_ap is None
        text = str(report)
        assert text.startswith("ok: GFL (")
        options = "crosskd     cut 3, teacher_cut 3, strategy a"
        for line in (
            "losses      crosskd/cls x 1, crosskd/reg x 1",
            options,
            "adapters    crosskd.adapters.cls, crosskd",
            "step        ",
            "memory      about ",
        ):
            assert f"\n  {line}" in text

    def test_cost(self) -> None:
        student, teacher = make_detector("gfl"), make_detector("gfl", seed=1)
        small = check_pair(student, teacher, image_size=(256, 256), batch_size=1).cost
        large = check_pair(student, teacher, image_size=(512, 512), batch_size=1).cost
        two = check_pair(student, teacher, image_size=(256, 256), batch_size=2).cost
        assert 1.2 * small.student_flops < small.flops < 3 * small.student_flops
        assert small.bytes > small.student_bytes > 3 * 4 * sum(p.numel() for p in student.head.parameters())
        assert large.flops == pytest.approx(4 * small.flops)
        assert two.flops == small.flops
        assert small.bytes < two.bytes < 2 * small.bytes

    def test_flops_of_a_convolution_step(self) -> None:
        """Without a head of its own the count is that of forward and both backward passes of every convolution."""
        student = make_detector("gfl", frozen_stages=0)
        cost = check_pair(student, make_detector("gfl"), image_size=(256, 256)).cost
        forward = 0

        def count(module: torch.nn.Module, _: object, output: torch.Tensor) -> None:
            nonlocal forward
            forward += 2 * output.numel() // output.shape[1] * module.weight.numel()

        hooks = [m.register_forward_hook(count) for m in student.modules() if isinstance(m, torch.nn.Conv2d)]
        with torch.no_grad():
            student.eval()(torch.zeros(1, 3, 256, 256))
        for hook in hooks:
            hook.remove()
        assert cost.student_flops == pytest.approx(3 * forward, rel=0.05)

    def test_the_models_stay_as_they_were(self) -> None:
        student, teacher = make_detector("gfl", norm_eval=False).train(), make_detector("gfl", seed=1).train()
        states = copy.deepcopy([student.state_dict(), teacher.state_dict()])
        flags = [p.requires_grad for model in (student, teacher) for p in model.parameters()]
        check_pair(student, teacher)
        assert student.training
        assert teacher.training
        assert student.backbone.net.bn1.training
        assert not teacher.backbone.net.bn1.training
        assert [p.requires_grad for model in (student, teacher) for p in model.parameters()] == flags
        assert all(p.grad is None for model in (student, teacher) for p in model.parameters())
        for model, state in zip((student, teacher), states, strict=True):
            assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())

    def test_placeholder_names(self) -> None:
        report = check_pair(make_detector("gfl"), make_detector("gfl"), measure=False)
        assert [warning for warning in report.warnings if "placeholder names" in warning]

    def test_classes_unknown_to_the_teacher(self) -> None:
        student = names(make_detector("gfl"), "cow", "unicorn", "dog")
        teacher = names(make_detector("gfl", num_labels=4), "dog", "cat", "cow", "bird")
        report = check_pair(student, teacher, measure=False)
        assert report.ok
        assert "not distilled, unknown to the teacher: unicorn" in str(report)
        assert report.cost is None


class TestBadPairs:
    @staticmethod
    def problem(report: PairReport) -> str:
        assert not report.ok
        assert report.cost is None
        assert str(report).startswith("problem: ")
        assert report.problem in str(report)
        return report.problem

    def test_strides(self) -> None:
        student = make_detector("gfl", strides=(4, 8, 16, 32, 64), backbone_strides=(4, 8, 16, 32))
        assert "build the student with strides=(8, 16, 32, 64, 128)" in self.problem(
            check_pair(student, make_detector("gfl"))
        )

    def test_classes(self) -> None:
        student = names(make_detector("gfl"), "a", "b", "c")
        assert "share no class name" in self.problem(check_pair(student, make_detector("gfl")))

    def test_cut(self) -> None:
        report = check_pair(make_detector("gfl"), make_detector("gfl"), [CrossKD(cut=9)])
        assert "choose 0 to 4" in self.problem(report)

    def test_a_teacher_with_nan(self) -> None:
        teacher = make_detector("gfl")
        with torch.no_grad():
            teacher.head.classifier.weight.fill_(float("nan"))
        assert "is nan: check teacher and data" in self.problem(check_pair(make_detector("gfl"), teacher))

    def test_a_student_with_a_frozen_trunk(self) -> None:
        student = make_detector("gfl").requires_grad_(False)
        student.head.classifier.requires_grad_(True)
        assert "is its trunk frozen?" in self.problem(check_pair(student, make_detector("gfl", seed=1)))

    def test_another_family(self) -> None:
        from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

        backbone = ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], out_features=["stage4"]
        )
        sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "num_queries": 3}
        heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
        config = DetrConfig(use_timm_backbone=False, backbone_config=backbone, **sizes, **heads)
        teacher = DetrForObjectDetection(config)
        assert self.problem(check_pair(make_detector("gfl"), teacher, measure=False))


class TestTeacherAP:
    @staticmethod
    def oracle(monkeypatch: pytest.MonkeyPatch, data: DetectionData, classes: tuple[str, ...]) -> DenseDetector:
        """A teacher that finds what is there, image after image as evaluation reads them, in its order of classes."""
        teacher = names(make_detector("gfl", num_labels=len(classes)), *classes)
        examples = (data.dataset[index] for index in ByShape(data.dataset["width"], data.dataset["height"]))

        def forward(pixel_values: torch.Tensor, pixel_mask: torch.Tensor) -> DenseDetectorOutput:
            rows_of_data = [next(examples) for _ in pixel_values]
            truth = [example["objects"] for example in rows_of_data]
            sizes = torch.tensor([[example["height"], example["width"]] for example in rows_of_data]).float()
            rows = max(len(objects["bbox"]) for objects in truth)
            logits = torch.full((len(truth), rows, len(classes)), -20.0)
            boxes = torch.zeros(len(truth), rows, 4)
            for image, objects in enumerate(truth):
                for row, (box, category) in enumerate(zip(objects["bbox"], objects["category"], strict=True)):
                    name = data.categories.names[category]
                    x, y, width, height = box
                    xyxy = torch.tensor([[[x, y, x + width, y + height]]])
                    boxes[image, row] = to_relative(xyxy, sizes[image][None])[0, 0]
                    if name in classes:
                        logits[image, row, classes.index(name)] = 5.0
            return DenseDetectorOutput(logits=logits, pred_boxes=boxes)

        monkeypatch.setattr(teacher, "forward", forward)
        return teacher

    def test_of_an_oracle_is_one(self, monkeypatch: pytest.MonkeyPatch, shapes: DetectionData) -> None:
        teacher = self.oracle(monkeypatch, shapes, ("unicorn", *reversed(shapes.categories.names)))
        processors = [DetectionImageProcessor(size=SIZE, nms_threshold=1.0) for _ in range(2)]
        assert teacher_ap(teacher, shapes, *processors, batch_size=2) == pytest.approx(1.0)

    def test_unknown_classes_count_zero(self, monkeypatch: pytest.MonkeyPatch, shapes: DetectionData) -> None:
        there = sorted({category for example in shapes.dataset for category in example["objects"]["category"]})
        teacher = self.oracle(monkeypatch, shapes, tuple(shapes.categories.names[index] for index in there[:2]))
        expected = 2 / len(there)
        processor = DetectionImageProcessor(size=SIZE, nms_threshold=1.0)
        assert teacher_ap(teacher, shapes, processor) == pytest.approx(expected)

    def test_of_a_teacher_that_knows_nothing(self, shapes: DetectionData) -> None:
        student, teacher = (
            names(make_detector("gfl", seed, num_labels=4), *shapes.categories.names) for seed in (0, 1)
        )
        processors = DetectionImageProcessor(size=SIZE), DetectionImageProcessor()
        report = check_pair(student, teacher, ["crosskd"], *processors, dataset=shapes, images=3, measure=False)
        assert report.ok
        assert report.teacher_images == 3
        assert report.teacher_ap < 0.05
        assert "on 3 images" in str(report)
        assert any("hardly detects anything" in warning for warning in report.warnings)
        assert any("'height': 64" in warning for warning in report.warnings)

    def test_needs_a_processor(self, shapes: DetectionData) -> None:
        with pytest.raises(ValueError, match="needs student_processor"):
            check_pair(make_detector("gfl"), make_detector("gfl"), dataset=shapes)


@pytest.mark.parametrize(
    ("classes", "warning"),
    [
        (("circle", "square", "triangle", "star"), None),
        (("star", "square", "triangle", "circle"), "classes in another order"),
        (("circle", "square", "triangle"), "can't be trained on this data, it has 3 classes, 'circle'"),
    ],
)
def test_classes_of_the_data(shapes: DetectionData, classes: tuple[str, ...], warning: str | None) -> None:
    student, teacher = (make_detector("gfl", seed, num_labels=len(classes)) for seed in (0, 1))
    for model in (student, teacher):
        names(model, *classes)
    processor = DetectionImageProcessor(size=SIZE)
    report = check_pair(student, teacher, ["crosskd"], processor, processor, shapes, images=1, measure=False)
    found = [text for text in report.warnings if "data" in text]
    assert len(found) == (warning is not None)
    assert all(str(warning) in text for text in found)


def test_docs_show_good_and_bad_pairs() -> None:
    text = (Path(__file__).parents[2] / "docs" / "pairs.md").read_text()
    assert text.count("\nok: ") + text.count("\nproblem: ") == 5
    assert text.count("\nproblem: ") >= 2
