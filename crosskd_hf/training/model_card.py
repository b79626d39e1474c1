"""The card of a distilled detector: `README.md` with the metadata that the Hub reads."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..text import code_span, markdown, one_line

_TEMPLATE = """---
{{ card_data }}
---

{{ body }}
"""
_USE = """## Use

```python
from PIL import Image
from transformers import pipeline

detector = pipeline("object-detection", model={model_id}{options})
print(detector(Image.open("image.jpg")))
```
{remark}"""
_OWN_CODE = """
`trust_remote_code=True` runs the code of the architecture, which lies beside the weights. After `import crosskd_hf` the
installed package runs instead, without that argument.
"""
_MOST_CLASSES = 100
_ADDRESS = re.compile(r"https://[\w./-]+")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_PIXELS = """
`pipeline` converts images of more than 8 bits, and those with a transparent palette, in another way than training did.
Open such files as in training: `detector({opener}("x-ray.tif"))`.
"""
_OPENER = """That needs crosskd_hf, and `import crosskd_hf.data.images`.
"""
_METRICS = {
    "eval_map": "box AP",
    "eval_map_50": "box AP50",
    "eval_map_75": "box AP75",
    "eval_map_small": "box AP small",
    "eval_map_medium": "box AP medium",
    "eval_map_large": "box AP large",
}


@dataclass
class CardContent:
    """What a card tells.

    Args:
        name: Title and `model-index` name.
        architecture: Class of the student.
        metrics: As of `CrossKDTrainer.evaluate`; only the COCO summary is shown.
        dataset: Name of the data set that was evaluated.
        model_id: How the model is loaded: Hub id or folder.
        license: SPDX id in the Hub's spelling. It is the author's decision, so there is no default.
        teacher: Hub id of the teacher, if it has one.
        provenance: Content of `distillation.json`; None for a model trained alone.
        tags: Beside "crosskd" and "object-detection".
        classes: What is detected, in the order of the labels.
        training: Name of a setting -> its value, as both are shown.
        language: Code of the language of the class names.
        base: Hub id of the model that the student was fine-tuned from.
        data_ids: Hub ids of data sets, beside `dataset`.
        own_code: Whether the architecture is no part of transformers, and its code is saved beside the weights.
    """

    name: str
    architecture: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    dataset: str = "evaluation data"
    model_id: str = "."
    license: str | None = None
    teacher: str | None = None
    provenance: Mapping[str, Any] | None = None
    tags: Sequence[str] = ()
    classes: Sequence[str] = ()
    training: Mapping[str, str] = field(default_factory=dict)
    own_code: bool = False
    language: str | None = None
    base: str | None = None
    data_ids: Sequence[str] = ()


def model_card(content: CardContent) -> ModelCard:
    """Write the card; `str(card)` is the content of `README.md`."""
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="object-detection",
        license=content.license,
        language=content.language,
        base_model=_one_or_all([content.base, content.teacher]),
        datasets=[name for name in (*content.data_ids, content.dataset) if _HUB_ID.fullmatch(name)] or None,
        tags=["object-detection", *(["crosskd"] if content.provenance else []), *content.tags],
        model_name=one_line(content.name),
        eval_results=_eval_results(content) or None,
    )
    parts = (
        f"# {markdown(content.name)}",
        _summary(content),
        _results(content),
        _use(content),
        _classes(content),
        _training(content),
        _distillation(content),
    )
    body = "\n\n".join(part.strip() for part in parts if part)
    return ModelCard.from_template(data, template_str=_TEMPLATE, body=body)


def _one_or_all(names: Sequence[str | None]) -> Any:
    given = [name for name in names if name]
    return given if len(given) > 1 else next(iter(given), None)


def _use(content: CardContent) -> str:
    options = ", trust_remote_code=True" if content.own_code else ""
    return _USE.format(model_id=json.dumps(content.model_id), options=options, remark=_remarks(content.own_code))


def _remarks(own_code: bool) -> str:
    if own_code:
        return _OWN_CODE + _PIXELS.format(opener="detector.image_processor.open_image")
    return _PIXELS.format(opener="crosskd_hf.data.images.open_image") + _OPENER


def _shown(metrics: Mapping[str, float]) -> dict[str, float]:
    return {key: metrics[key] for key in _METRICS if key in metrics and metrics[key] == metrics[key]}


def _eval_results(content: CardContent) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="object-detection",
            dataset_type=_dataset_type(content.dataset),
            dataset_name=one_line(content.dataset),
            metric_type="mAP",
            metric_name=_METRICS[key],
            metric_value=round(value, 4),
        )
        for key, value in _shown(content.metrics).items()
    ]


def _dataset_type(dataset: str) -> str:
    """An id of the Hub as it is; a word of the same letters for anything else."""
    if _HUB_ID.fullmatch(dataset):
        return dataset
    return re.sub(r"[^\w./-]+", "-", dataset.lower()).strip("-") or "unknown"


def _summary(content: CardContent) -> str:
    text = f"An object detector ({code_span(content.architecture)}), trained with crosskd_hf."
    if content.provenance:
        teacher = content.provenance["teacher"]
        text += f" It was distilled from {code_span(content.teacher or teacher['class'])}."
    return text


def _results(content: CardContent) -> str:
    shown = _shown(content.metrics)
    if not shown:
        return ""
    rows = [f"| {_METRICS[key]} | {100 * value:.1f} |" for key, value in shown.items()]
    return "\n".join([f"## Results on {markdown(content.dataset)}", "", "| metric | % |", "|---|---|", *rows, ""])


def _classes(content: CardContent) -> str:
    if not content.classes:
        return ""
    names = ", ".join(map(markdown, content.classes[:_MOST_CLASSES]))
    rest = len(content.classes) - _MOST_CLASSES
    more = f" and {rest} more, see `id2label` in `config.json`" if rest > 0 else ""
    return f"## Classes\n\n{len(content.classes)}: {names}{more}.\n"


def _training(content: CardContent) -> str:
    if not content.training:
        return ""
    rows = [f"| {markdown(name)} | {markdown(value)} |" for name, value in content.training.items()]
    return "\n".join(["## Training", "", "| setting | value |", "|---|---|", *rows, ""])


def _distillation(content: CardContent) -> str:
    if not content.provenance:
        return ""
    distillation = content.provenance["distillation"]
    papers = "".join(f"- {markdown(name)}: {_paper(paper)}\n" for name, paper in distillation["papers"].items())
    settings = {name: value for name, value in distillation.items() if name not in ("papers", "adapters")}
    sha256 = content.provenance["teacher"]["sha256"]
    text = json.dumps(settings, indent=2, sort_keys=True)
    return f"## Distillation\n\n{papers}\nTeacher weights: sha256 `{sha256}`\n\n```json\n{text}\n```\n"


def _paper(text: str) -> str:
    """A paper as text, with its address as a link if it is a plain one."""
    title, comma, address = text.rpartition(", ")
    return f"{markdown(title)}, <{address}>" if comma and _ADDRESS.fullmatch(address) else markdown(text)
