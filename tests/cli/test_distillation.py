"""`crosskd-hf check-pair`; what `methods` prints is compared in tests/test_docs.py."""

from pathlib import Path

from crosskd_hf.create import DetectorSpec, build_detector
from crosskd_hf.data.categories import CategoryMap
from crosskd_hf.models import DetectionImageProcessor
from tests.cli.running import Output, run


def test_check_pair(tmp_path: Path, detector: Path, folder_of_data: Path, capsys: Output) -> None:
    assert run("check-pair", detector, detector) == 0
    assert capsys.readouterr().out.startswith("ok: GFL")
    categories = CategoryMap((1,), ("zeppelin",))
    build_detector(DetectorSpec("gfl", "test_resnet", width=32), categories).save_pretrained(tmp_path)
    DetectionImageProcessor().save_pretrained(tmp_path)
    assert run("check-pair", detector, tmp_path) == 1
    assert "share no class name" in capsys.readouterr().out
    assert run("check-pair", "gfl:test_efficientnet_gn", detector, "--data", folder_of_data, "--number", 2) == 0
    assert "on 1 images" in capsys.readouterr().out
    assert run("check-pair", "gfl:test_efficientnet_gn", detector) == 0
    both = "--data", folder_of_data, "--annotations", tmp_path, "--images", tmp_path
    assert run("check-pair", detector, detector, *both) == 1
    assert "Give --data or --annotations, not both" in capsys.readouterr().err
    assert run("check-pair", detector, detector, "--images", tmp_path) == 1
    assert "both of --annotations and --images" in capsys.readouterr().err
