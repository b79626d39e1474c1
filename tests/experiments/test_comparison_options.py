"""Options of the examples: what has no effect is refused."""

import pytest

from crosskd_hf.experiments.comparison_options import DenseOptions, DetrOptions


def test_defaults_are_accepted() -> None:
    assert DenseOptions().unread == DetrOptions().unread == []


def test_ways_to_read_rows_are_for_the_hub_data_set_too() -> None:
    options = DetrOptions(dataset="user/data", bbox_format="xyxy", drop=["size-mismatch"])
    assert options.bbox_format == "xyxy"
    with pytest.raises(ValueError, match="--data_format has no effect without --data"):
        DetrOptions(dataset="user/data", data_format="voc")
    with pytest.raises(ValueError, match="--bbox_format, --drop has no effect without --data"):
        DetrOptions(bbox_format="xyxy", drop=["size-mismatch"])
