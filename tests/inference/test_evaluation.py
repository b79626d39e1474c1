"""The table of a model's metrics."""

from crosskd_hf.inference.evaluation import table


def test_table() -> None:
    metrics = dict.fromkeys(("map", "map_50", "map_75", "map_small", "map_medium", "map_large"), 0.25)
    lines = table({**metrics, "map_cat": 0.5, "map_dog": float("nan")}).splitlines()
    assert lines[1].split() == ["25.0"] * 6
    assert lines[-1].split() == ["50.0", "cat"]
