"""What a decoder of transformers is given and gives, taken on its way by hooks."""

import inspect
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput


@dataclass
class Trace:
    """One pass of a decoder: arguments by name, of it and of each layer, and what each layer and the decoder gave."""

    arguments: dict[str, Any]
    layers: list[dict[str, Any]] = field(default_factory=list)
    hidden_states: list[Tensor] = field(default_factory=list)  # per layer (B, Q, C)
    output: ModelOutput | None = None
    own_queries: slice = field(default_factory=lambda: slice(None))  # those that are there at inference too

    @property
    def memory(self) -> Tensor:
        """What the decoder reads, (B, S, C)."""
        return self.arguments["encoder_hidden_states"]

    @property
    def level_shapes(self) -> list[tuple[int, int]] | None:
        """(height, width) of each level of the memory; None where the decoder isn't told (one level)."""
        shapes = self.arguments.get("spatial_shapes_list")
        return None if shapes is None else [(int(height), int(width)) for height, width in shapes]


class DecoderTap:
    """Hooks that keep the latest pass of a decoder until it is taken.

    Args:
        model: A detection model of transformers; its decoder is `model.model.decoder`. Copies and pickles of it work;
            there the hooks keep nothing.
        layers: Whether to keep the arguments and outputs of the layers too.
        owner: The hooks are taken off when it is garbage-collected; with None they stay until `remove`.
        predictions: Whether to keep passes in evaluation mode without gradient too. A teacher's are all like that; a
            student's are evaluation.
    """

    def __init__(self, model: Any, layers: bool, owner: object | None = None, predictions: bool = True) -> None:
        decoder = model.model.decoder
        self._open, self._predictions = True, predictions
        self._latest: Trace | None = None
        self._handles = [
            decoder.register_forward_pre_hook(self._enter, with_kwargs=True),
            decoder.register_forward_hook(self._leave),
        ]
        for layer in decoder.layers if layers else ():
            self._handles += [
                layer.register_forward_pre_hook(self._enter_layer, with_kwargs=True),
                layer.register_forward_hook(self._leave_layer),
            ]
        if owner is not None:
            weakref.finalize(owner, self.remove).atexit = False

    def __reduce__(self) -> tuple[Any, ...]:
        """Nobody takes what a copy's hooks find, and the tensors of a pass don't belong into a pickled model."""
        return _closed_tap, ()

    def _enter(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._open and (self._predictions or decoder.training or torch.is_grad_enabled()):
            self._latest = Trace(_by_name(decoder, args, kwargs))

    def _enter_layer(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._latest is not None and self._latest.output is None:  # not in a cross pass, not when recomputing
            self._latest.layers.append(_by_name(layer, args, kwargs))

    def _leave_layer(self, layer: Any, args: tuple[Any, ...], output: Any) -> None:
        if self._latest is not None and self._latest.output is None:
            self._latest.hidden_states.append(first(output))

    def _leave(self, decoder: Any, args: tuple[Any, ...], output: ModelOutput) -> None:
        if self._latest is not None:
            self._latest.output = output

    def take(self) -> Trace:
        """Hand out the latest pass and forget it.

        Raises:
            RuntimeError: The model has not been run since the last call.
        """
        trace, self._latest = self._latest, None
        if trace is None or trace.output is None:
            raise RuntimeError(
                "No pass of the decoder to distil from: run the model once before each call of the distiller, the very "
                "model (or a wrapper of it) that the distiller was built with, and a student not just to predict (in "
                "evaluation mode without gradient)."
            )
        return trace

    def remove(self) -> None:
        """Take the hooks off the model, and forget its latest pass."""
        self._latest = None
        for handle in self._handles:
            handle.remove()


def _closed_tap() -> DecoderTap:
    tap = DecoderTap.__new__(DecoderTap)
    tap._open, tap._predictions, tap._latest, tap._handles = False, False, None, []
    return tap


def first(output: Any) -> Tensor:
    """Hidden states of a decoder layer, which some families return in a tuple."""
    return output[0] if isinstance(output, tuple) else output


def _by_name(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    names = inspect.signature(module.forward).parameters
    return dict(zip(names, args, strict=False)) | kwargs
