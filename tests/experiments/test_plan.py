"""What `distill` is asked for."""

import pytest

from crosskd_hf.experiments.plan import Plan


def test_a_plan_names_its_teacher() -> None:
    assert Plan("gfl:resnet18").teacher_source == "gfl:resnet50"
    assert Plan("gfl:resnet18").trains_teacher
    assert not Plan("gfl:resnet18", "some/folder").trains_teacher
    with pytest.raises(ValueError, match="is a trained detector: name its teacher"):
        Plan("some/folder")
    with pytest.raises(ValueError, match="seeds=0"):
        Plan(seeds=0)
