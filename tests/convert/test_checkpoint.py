"""Files of unknown origin: read whole or refused with a reason, and never executed."""

import os
import pickle
import re
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from crosskd_hf.convert import CheckpointError, Conversion, read_checkpoint
from crosskd_hf.convert.checkpoint import load_exactly
from crosskd_hf.convert.class_names import COCO_IDS, COCO_NAMES, VOC_NAMES, choose_names, set_classes
from crosskd_hf.models import DetectionImageProcessor, GFLConfig, GFLForObjectDetection

STATE = OrderedDict(a=torch.arange(6.0).reshape(2, 3), n=torch.tensor(3))


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function: object, *arguments: object):
        self.call = function, arguments

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call


class LaterCall(Call):
    """Pickles as a call whose result is called in turn."""

    def __call__(self) -> None:
        pass


@pytest.mark.parametrize("legacy", [False, True])
def test_weights_and_meta(tmp_path: Path, legacy: bool) -> None:
    meta = {"cfg": "model = dict()", "epoch": 12, "CLASSES": ("cat", "dog")}
    path = tmp_path / "epoch_12.pth"
    torch.save({"meta": meta, "state_dict": STATE}, path, _use_new_zipfile_serialization=not legacy)
    checkpoint = read_checkpoint(path)
    assert checkpoint.state.keys() == STATE.keys()
    assert torch.equal(checkpoint.state["a"], STATE["a"])
    assert checkpoint.meta == meta
    assert checkpoint.source == "epoch_12.pth"
    assert re.fullmatch("[0-9a-f]{64}", checkpoint.sha256)


def test_wrappers(tmp_path: Path) -> None:
    parallel = {f"module.{name}": tensor for name, tensor in STATE.items()}
    for number, content in enumerate((parallel, {"model": STATE}, {"state_dict": parallel}, STATE)):
        torch.save(content, tmp_path / f"{number}.pth")
        assert read_checkpoint(tmp_path / f"{number}.pth").state.keys() == STATE.keys()
    save_file(dict(STATE), tmp_path / "a.safetensors")
    assert torch.equal(read_checkpoint(tmp_path / "a.safetensors").state["a"], STATE["a"])


def test_half_precision_becomes_float32(tmp_path: Path) -> None:
    torch.save({"a": STATE["a"].half(), "n": STATE["n"]}, tmp_path / "a.pth")
    state = read_checkpoint(tmp_path / "a.pth").state
    assert state["a"].dtype == torch.float32
    assert state["n"].dtype == torch.int64


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("where", ["meta", "state_dict", "beside"])
@pytest.mark.parametrize("name", ["os.system", "builtins.eval", "builtins.exec", "subprocess.call", "shutil.rmtree"])
def test_code_is_refused_and_not_executed(tmp_path: Path, name: str, where: str, legacy: bool) -> None:
    mark = tmp_path / "mark"
    module, _, function = name.rpartition(".")
    argument = f"open({str(mark)!r}, 'w')" if module == "builtins" else f"touch {mark}"
    content = {"state_dict": STATE, "meta": {}, where: Call(getattr(__import__(module), function), argument)}
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"refused, and nothing in it was executed.*holds '\S*" + function):
        read_checkpoint(tmp_path / "a.pth")
    assert not mark.exists()


def test_a_bare_pickle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(pickle.dumps({"state_dict": Call(os.mkdir, str(tmp_path / "mark"))}, protocol=2))
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path / "a.pth")
    assert not (tmp_path / "mark").exists()


def test_stand_ins_are_inert(tmp_path: Path) -> None:
    """`getattr` may be named in a file, but is not called: what it would have returned can't be called either."""
    content = {"state_dict": STATE, "meta": Call(getattr, "a", "upper")}
    torch.save(content, tmp_path / "a.pth")
    checkpoint = read_checkpoint(tmp_path / "a.pth")
    assert checkpoint.meta == {}
    torch.save({"state_dict": STATE, "meta": Call(LaterCall(getattr, "a", "upper"))}, tmp_path / "b.pth")
    with pytest.raises(CheckpointError, match="refused, and nothing in it was executed"):
        read_checkpoint(tmp_path / "b.pth")


def test_logs_of_mmengine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint of a running training holds MMEngine's log buffers: they are passed over, without MMEngine."""
    module = ModuleType("mmengine.logging.history_buffer")
    source = "class HistoryBuffer:\n    def mean(self): pass\n"
    exec(source, module.__dict__)
    for name in ("mmengine", "mmengine.logging"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    buffer = module.HistoryBuffer()
    buffer.__dict__ = {"_log_history": np.arange(3.0), "_statistics_methods": {"mean": module.HistoryBuffer.mean}}
    hub = {"log_scalars": OrderedDict({"train/loss": buffer}), "runtime_info": {"lr": np.float64(0.1)}}
    content = {"state_dict": STATE, "meta": {"epoch": 3}, "message_hub": hub}
    torch.save(content, tmp_path / "a.pth")
    for name in ("mmengine", "mmengine.logging", module.__name__):
        monkeypatch.delitem(sys.modules, name)
    checkpoint = read_checkpoint(tmp_path / "a.pth")
    assert torch.equal(checkpoint.state["a"], STATE["a"])
    assert checkpoint.meta == {"epoch": 3}


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("legacy", [False, True])
def test_truncated(tmp_path: Path, share: float, legacy: bool) -> None:
    torch.save(
        {"state_dict": {"a": torch.rand(100, 100)}}, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy
    )
    whole = (tmp_path / "a.pth").read_bytes()
    (tmp_path / "a.pth").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CheckpointError, match=r"a\.pth \(.* bytes\) is truncated or no PyTorch checkpoint"):
        read_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, None])
def test_broken_safetensors(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "a.safetensors"
    save_file(dict(STATE), path)
    path.write_bytes(path.read_bytes()[:-8] if content is None else content)
    with pytest.raises(CheckpointError, match="truncated or no PyTorch checkpoint"):
        read_checkpoint(path)


def test_few_bytes_that_stand_for_many(tmp_path: Path) -> None:
    """A hundred gigabytes: reading them would end the process."""
    torch.save({"state_dict": {"a": torch.zeros(1).half().expand(50_000, 10**6)}}, tmp_path / "repeated.pth")
    torch.save({"state_dict": {"a": torch.zeros(10**6)}}, tmp_path / "plain.pth")
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as plain,
        zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    assert read_checkpoint(tmp_path / "plain.pth").state["a"].shape == (10**6,)
    for name in ("repeated", "packed"):
        with pytest.raises(CheckpointError, match="bytes of weights, which no training writes"):
            read_checkpoint(tmp_path / f"{name}.pth")


def test_tied_weights_lie_in_the_file_once(tmp_path: Path) -> None:
    weight = torch.rand(100, 100)
    torch.save({"state_dict": {"a": weight, "b": weight, "c": weight.T}}, tmp_path / "a.pth")
    assert torch.equal(read_checkpoint(tmp_path / "a.pth").state["b"], weight)


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*a\.pth"):
        read_checkpoint(tmp_path / "a.pth")
    (tmp_path / "a.pth").write_text("<html>404: not found</html>")
    with pytest.raises(CheckpointError, match="truncated or no PyTorch checkpoint"):
        read_checkpoint(tmp_path / "a.pth")
    for content, message in (
        ([1, 2], "holds a list"),
        ({"optimizer": {}}, "holds no weights"),
        ({}, "holds no weights"),
    ):
        torch.save(content, tmp_path / "a.pth")
        with pytest.raises(CheckpointError, match=message):
            read_checkpoint(tmp_path / "a.pth")


class TestLoadExactly:
    def test_everything_has_a_place(self) -> None:
        source, target = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        nn.init.uniform_(source.weight)
        load_exactly(target, source.state_dict())
        assert torch.equal(source.weight, target.weight)

    def test_counters_may_be_missing(self) -> None:
        norm = nn.BatchNorm2d(4)
        load_exactly(norm, {name: value for name, value in norm.state_dict().items() if "num_batches" not in name})
        assert norm.num_batches_tracked == 0

    def test_names_what_does_not_fit(self) -> None:
        state = {"wieght": torch.zeros(4, 4), "bias": torch.zeros(5)}
        with pytest.raises(CheckpointError) as caught:
            load_exactly(nn.Linear(4, 4), state)
        for part in ("1 missing: ['weight']", "1 without a place: ['wieght']", "bias: (5,) in the checkpoint, (4,)"):
            assert part in str(caught.value)


class TestClassNames:
    def test_tables(self) -> None:
        assert len(COCO_NAMES) == len(COCO_IDS) == len(set(COCO_NAMES)) == 80
        assert dict(zip(COCO_NAMES, COCO_IDS, strict=True))["toothbrush"] == 90
        assert dict(zip(COCO_NAMES, COCO_IDS, strict=True))["stop sign"] == 13
        assert len(set(VOC_NAMES)) == 20

    def test_order_of_sources(self) -> None:
        assert choose_names(2, ["a", "b"], ["c", "d"]) == ("a", "b")
        assert choose_names(2, None, ["c", "d"]) == ("c", "d")
        assert choose_names(80, None, None) == COCO_NAMES
        assert choose_names(20, None, None) == VOC_NAMES

    @pytest.mark.parametrize(
        ("given", "embedded", "message"),
        [
            (None, None, "predicts 3 classes and doesn't name them: .*--labels"),
            (["a", "b"], None, "2 class names were given .* predicts 3 classes"),
            (None, ["a"] * 4, "4 class names stand in the checkpoint"),
            (["a", "b", "a"], None, r"occur twice: \['a'\]"),
        ],
    )
    def test_refused(self, given: list[str] | None, embedded: list[str] | None, message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            choose_names(3, given, embedded)

    def test_coco_gets_its_raw_ids(self) -> None:
        config = GFLConfig()
        set_classes(config, COCO_NAMES)
        assert config.category_ids == list(COCO_IDS)
        set_classes(config, ("cat", "dog"))
        assert config.category_ids is None
        assert config.num_labels == 2
        assert config.label2id == {"cat": 0, "dog": 1}


def test_conversion_writes_a_folder_once(tmp_path: Path) -> None:
    config = GFLConfig(backbone="test_resnet", num_labels=3, fpn_channels=32, head_channels=32, norm_groups=8)
    conversion = Conversion(GFLForObjectDetection(config), DetectionImageProcessor(), {"detector": "GFL", "size": "8"})
    folder = conversion.save(tmp_path / "out")
    files = {"config.json", "model.safetensors", "preprocessor_config.json", "conversion.json"}
    assert files <= {path.name for path in folder.iterdir()}
    assert not list(folder.glob("*.bin"))
    with pytest.raises(FileExistsError, match="not empty"):
        conversion.save(folder)
    conversion.save(folder, overwrite=True)
    assert str(conversion).splitlines() == ["detector  GFL", "size      8"]
