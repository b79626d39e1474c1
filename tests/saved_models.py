"""What a detector has to do after saving, whatever its kind: be the same, also where the package is not installed."""

import copy
from pathlib import Path

import torch
from transformers import PreTrainedModel

from crosskd_hf.models import DetectionImageProcessor
from tests import fresh
from tests.tiny_dense import make_batch

REMOTE = """
import sys
sys.modules["crosskd_hf"] = None  # as where the package is not installed
import torch
from transformers import AutoImageProcessor, AutoModelForObjectDetection
folder = sys.argv[1]
model = AutoModelForObjectDetection.from_pretrained(folder, trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
with torch.no_grad():
    logits = model(torch.load(sys.argv[2])).logits
torch.save(logits, sys.argv[3])
assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
assert type(processor).__name__ == "DetectionImageProcessor"
"""


def same_state(model: PreTrainedModel, other: PreTrainedModel) -> bool:
    state, loaded = model.state_dict(), other.state_dict()
    return state.keys() == loaded.keys() and all(torch.equal(state[key], loaded[key]) for key in state)


def same_outputs(model: PreTrainedModel, other: PreTrainedModel, pixels: torch.Tensor) -> bool:
    # A copy, for weights mapped from a file lie at odd addresses, where some convolutions round in another order.
    with torch.no_grad():
        outputs = [copy.deepcopy(detector).eval()(pixels.to(detector.dtype)) for detector in (model, other)]
    return all(torch.equal(outputs[0][key], outputs[1][key]) for key in ("logits", "pred_boxes"))


def check_remote_code(model: PreTrainedModel, folder: Path) -> None:
    """Save the model, and compare its logits with those of a process that must not import the package."""
    model, pixels = model.eval(), make_batch()["pixel_values"]
    model.save_pretrained(folder / "model")
    DetectionImageProcessor().save_pretrained(folder / "model")
    torch.save(pixels, folder / "pixels.pt")
    arguments = [str(folder / name) for name in ("model", "pixels.pt", "logits.pt")]
    done = fresh.run(REMOTE, *arguments, folder=folder)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        assert torch.equal(torch.load(folder / "logits.pt"), model(pixels).logits)
