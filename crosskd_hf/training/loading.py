"""A student from its checkpoints, with or without adapters of peft: whole, or not at all."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from transformers import PreTrainedModel
from transformers.utils import is_peft_available

from ..inference.loading import demand_complete


def bare_model(model: Any) -> Any:
    """The detector itself, if peft has wrapped `model`; its layers are the adapted ones."""
    if is_peft_available():
        from peft import PeftModel

        if isinstance(model, PeftModel):
            return model.get_base_model()
    return model


def load_student(model: PreTrainedModel, folder: str | os.PathLike[str]) -> None:
    """Load a checkpoint's weights into `model` by way of `from_pretrained`, which alone knows how names are stored.

    Of a model with adapters of peft the checkpoint holds the adapters alone, and so they alone are loaded.

    Raises:
        ValueError: The checkpoint's weights are not those of this model.
    """
    if has_adapters(model):
        _load_adapters(model, Path(folder))
        return
    model.load_state_dict(load_fresh(model, folder).state_dict(), strict=True)


def load_fresh(model: PreTrainedModel, folder: str | os.PathLike[str]) -> PreTrainedModel:
    """A checkpoint as a new model of the class and type of `model`, which has no adapters.

    Raises:
        ValueError: The checkpoint's weights are not those of this model.
    """
    fresh, report = type(model).from_pretrained(
        folder, config=copy.deepcopy(model.config), dtype=model.dtype, output_loading_info=True
    )
    demand_complete(report, f"The checkpoint {os.fspath(folder)!r}", "a checkpoint of this student")
    return fresh


def has_adapters(model: Any) -> bool:
    """Whether peft adapts `model`, which then saves its adapters alone."""
    return is_peft_available() and bool(getattr(model, "peft_config", None))


def _load_adapters(model: Any, folder: Path) -> None:
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from peft.utils import SAFETENSORS_WEIGHTS_NAME

    state = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
    name = next(iter(model.peft_config))
    prefix = "" if bare_model(model) is not model else "base_model.model."
    own = {f"{prefix}{key}" for key in get_peft_model_state_dict(model, adapter_name=name)}
    if set(state) != own:
        raise ValueError(
            f"The adapters in {folder} are not those of this student, such as {sorted(own ^ set(state))[:3]}: give a "
            "checkpoint of this student."
        )
    set_peft_model_state_dict(model, {key.removeprefix(prefix): tensor for key, tensor in state.items()}, name)
