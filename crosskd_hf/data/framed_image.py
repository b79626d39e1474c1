"""A data set column of images that know the frame their annotations were made for."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import datasets
import PIL.Image
import pyarrow as pa  # type: ignore[import-untyped]
from datasets.features.features import register_feature

from .images import open_upright


@dataclass
class FramedImage:
    """Like `datasets.Image`, but decoded by `open_upright`: RGB as a person sees it, in the annotations' frame.

    Images of more than 8 bits keep their values: the image processor knows their range.

    The storage is `{"bytes", "path", "width", "height"}`, width and height (px) being those of the annotations.
    `dataset.cast_column("image", datasets.Image())` makes a plain image column of it, e.g. to upload the data set.

    Args:
        decode: False hands out the storage instead of a PIL image.
    """

    decode: bool = True
    id: str | None = field(default=None, repr=False)
    dtype: ClassVar[str] = "PIL.Image.Image"
    pa_type: ClassVar[Any] = pa.struct(
        {"bytes": pa.binary(), "path": pa.string(), "width": pa.int64(), "height": pa.int64()}
    )
    _type: str = field(default="FramedImage", init=False, repr=False)

    def __call__(self) -> Any:
        """The Arrow type."""
        return self.pa_type

    def encode_example(self, value: Any) -> dict[str, Any]:
        """Storage of a path, PIL image, or storage."""
        size = (value.get("width"), value.get("height")) if isinstance(value, Mapping) else (None, None)
        return {**datasets.Image().encode_example(value), "width": size[0], "height": size[1]}

    def decode_example(self, value: Mapping[str, Any], token_per_repo_id: Any = None) -> PIL.Image.Image:
        """The PIL image of a storage; raises as `open_image`."""
        return open_upright(value, None if value["width"] is None else (value["width"], value["height"]))

    def cast_storage(self, storage: Any) -> Any:
        """An Arrow array of image storages, framed or plain, as one of this feature."""
        plain = datasets.Image().cast_storage(storage)
        framed = pa.types.is_struct(storage.type) and storage.type.get_field_index("width") >= 0
        sizes = [storage.field(key) if framed else pa.nulls(len(storage), pa.int64()) for key in ("width", "height")]
        return self._join(plain, sizes)

    @classmethod
    def _join(cls, plain: Any, sizes: list[Any]) -> Any:
        fields = [plain.field("bytes"), plain.field("path"), *sizes]
        return pa.StructArray.from_arrays(fields, fields=list(cls.pa_type), mask=plain.is_null())

    @classmethod
    def column(cls, paths: list[str], widths: Any, heights: Any) -> Any:
        """The Arrow array of image files and the sizes (px) their annotations were made for."""
        plain = datasets.Image().cast_storage(pa.array(paths, pa.string()))
        return cls._join(plain, [pa.array(widths), pa.array(heights)])


with warnings.catch_warnings():  # it is called experimental since 2024; needed to load a saved data set
    warnings.simplefilter("ignore", UserWarning)
    register_feature(FramedImage, "FramedImage")
