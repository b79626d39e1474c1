"""What a release of torch can't do."""

import pytest
import torch

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))

# In torch 2.8 fake tensors on a GPU that is not there ask for its driver, or abort; 2.11 was the next release tried.
needs_fake_gpu = pytest.mark.skipif(TORCH < (2, 11), reason="torch 2.8's fake tensors need the GPU that they stand for")
