"""Pictures that are the same in every run."""

import numpy as np
import PIL.Image


def noise(size: tuple[int, int], deviation: float, seed: int = 0) -> PIL.Image.Image:
    """A grey picture of `size` (width, height). Pillow's `effect_noise` takes no seed."""
    values = np.random.default_rng(seed).normal(128, deviation, size[::-1])
    return PIL.Image.fromarray(values.clip(0, 255).astype(np.uint8))
