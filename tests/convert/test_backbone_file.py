"""Backbone weights from files of OpenMMLab, torchvision and timm."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from crosskd_hf.convert.backbone_file import load_backbone_file
from crosskd_hf.convert.checkpoint import CheckpointError
from crosskd_hf.create import DetectorSpec, build_detector
from crosskd_hf.data.categories import CategoryMap
from crosskd_hf.models.backbone import Backbone

NET = "test_resnet"


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return timm.create_model(NET).state_dict()


def backbone() -> Backbone:
    torch.manual_seed(2)
    return Backbone(NET, (8, 16, 32), frozen_stages=0, norm_eval=False)


@pytest.mark.parametrize("prefix", ["", "backbone."])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_names_of_torchvision(state: dict[str, torch.Tensor], prefix: str, suffix: str, tmp_path: Path) -> None:
    """With a classifier that has no place, and without the counters of batches, which Caffe's don't have."""
    renamed = {prefix + name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": renamed, "meta": {}}, path)
    else:
        save_file(renamed, path)
    net = backbone()
    load_backbone_file(net, path)
    for name, tensor in net.net.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(tensor, state[name], rtol=0, atol=0)


def test_a_new_detector_starts_from_a_file(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    torch.save(state, tmp_path / "weights.pth")
    spec = DetectorSpec("gfl", NET, str(tmp_path / "weights.pth"), width=16)
    model = build_detector(spec, CategoryMap((1,), ("thing",)))
    own = model.backbone.net.state_dict()
    assert all(torch.equal(own[name], state[name]) for name in own)


def test_another_net_is_refused(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    name = next(name for name in state if name.endswith("conv2.weight"))
    torch.save(state | {name: torch.zeros(1)}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"doesn't fit the backbone test_resnet.* 1 have another shape"):
        load_backbone_file(backbone(), tmp_path / "weights.pth")


def test_a_pickle_is_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "R-50.pkl").write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(CheckpointError, match=r"is refused.*\.safetensors"):
        load_backbone_file(backbone(), tmp_path / "R-50.pkl")
