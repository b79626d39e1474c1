"""Post-processing of a young model's scores against a trained one's, and of batches of several sizes.

    python benchmarks/postprocess_time.py

Prints JSON: milliseconds of `DetectionImageProcessor.post_process_object_detection` for the priors of 800 x 1344 px and
80 classes, median and minimum of rounds that take turns, and the ratio of each kind of scores to trained ones. Batches
are of trained scores. About a minute.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from transformers.utils import ModelOutput

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from crosskd_hf.models.processors import image_processor

LEVELS = (100 * 168, 50 * 84, 25 * 42, 13 * 21, 7 * 11)
CLASSES = 80


def outputs(kind: str, images: int) -> ModelOutput:
    """A model's outputs with scores of a kind."""
    generator = torch.Generator().manual_seed(0)
    count = sum(LEVELS)
    noise = torch.randn(images, count, CLASSES, generator=generator)
    center, size = (torch.rand(images, count, 2, generator=generator) for _ in range(2))
    return ModelOutput(
        logits=_logits(kind, noise, generator),
        pred_boxes=torch.cat([center, 0.3 * size**2], 2),
        level_lengths=torch.tensor([LEVELS] * images),
    )


def _logits(kind: str, noise: Tensor, generator: torch.Generator) -> Tensor:
    if kind == "trained":  # a few hundred priors an image have one class well above the threshold
        logits = noise - 9
        sure = torch.rand(noise.shape[:2], generator=generator) < 0.02
        logits[..., 0] += 10 * sure
        return logits
    if kind == "young":  # every class of every prior lies around the threshold
        return 0.3 * noise - 2.9
    if kind == "all above":
        return noise.abs()
    return torch.zeros_like(noise)  # all equal


def milliseconds(found: ModelOutput) -> float:
    """Of one call."""
    processor = image_processor("gfl")
    sizes = [(800, 1333)] * len(found["logits"])
    start = time.perf_counter()
    processor.post_process_object_detection(found, 0.0, sizes)
    return 1000 * (time.perf_counter() - start)


def main() -> None:
    """Time all, turn and turn about."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="calls of each")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cases = {kind: outputs(kind, 8) for kind in ("trained", "young", "all above", "all equal")}
    cases |= {f"batch of {size}": outputs("trained", size) for size in (1, 2, 4)}
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(args.rounds + 1):
        for name, found in cases.items():
            taken[name].append(milliseconds(found))
    taken = {name: values[1:] for name, values in taken.items()}  # the first round warms up
    result = {}
    for name, values in taken.items():
        ratios = [value / trained for value, trained in zip(values, taken["trained"], strict=True)]
        result[name] = {
            "median_ms": median(values),
            "min_ms": min(values),
            "to_trained": {"median": median(ratios), "min": min(ratios)},
        }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
