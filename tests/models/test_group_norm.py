"""GroupNorm by sums that keep a GPU busy: equal to torch's in value and gradient, in every precision and format."""

import pytest
import torch
import torch.nn.functional as F

from crosskd_hf.models import GFLConfig
from crosskd_hf.models.group_norm import GroupNorm, Normalise
from tests.tiny_run import make_detector

GROUPS, EPS = 4, 1e-5
FORMATS = (torch.contiguous_format, torch.channels_last)


def drawn(layout: torch.memory_format, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """Maps far from zero mean, weight, bias and the gradient of the result."""
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 12, 5, 7), (12,), (12,), (2, 12, 5, 7)
    x, weight, bias, gradient = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    x, gradient = ((each + 3).to(dtype, memory_format=layout) for each in (x, gradient))
    return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), gradient


@pytest.mark.parametrize("layout", FORMATS)
def test_values_and_gradients_are_torchs(layout: torch.memory_format) -> None:
    *given, gradient = drawn(layout)
    x, weight, bias = given
    ours, theirs = Normalise.apply(x, weight, bias, GROUPS, EPS), F.group_norm(x, GROUPS, weight, bias, EPS)
    torch.testing.assert_close(ours, theirs)
    for got, expected in zip(*(torch.autograd.grad(y, given, gradient) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precisions(dtype: torch.dtype, layout: torch.memory_format) -> None:
    x, weight, bias, gradient = drawn(layout, dtype)
    factors = [each.detach().float().requires_grad_() for each in (weight, bias)]
    y = Normalise.apply(x, *factors, GROUPS, EPS)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=layout)
    exact = [x.detach().double().requires_grad_(), weight, bias]
    expected = F.group_norm(exact[0], GROUPS, weight, bias, EPS)
    share = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), expected, rtol=share, atol=8 * torch.finfo(torch.float32).eps)
    found = torch.autograd.grad(y, [x, *factors], gradient)
    assert [each.dtype for each in found] == [dtype, torch.float32, torch.float32]
    for got, wanted in zip(found, torch.autograd.grad(expected, exact, gradient.double()), strict=True):
        error = (got.double() - wanted).norm() / wanted.norm()
        assert error < max(share, 2e-6)


def test_autocast_neither_widens_nor_narrows() -> None:
    x, weight, bias, gradient = drawn(torch.contiguous_format, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        y = Normalise.apply(x, weight.float(), bias.float(), GROUPS, EPS)
        dx = torch.autograd.grad(y, x, gradient)[0]
    assert y.dtype == dx.dtype == torch.bfloat16
    torch.testing.assert_close(y, Normalise.apply(x, weight.float(), bias.float(), GROUPS, EPS), rtol=0, atol=0)


def test_frozen_weights_get_no_gradient() -> None:
    x, weight, bias, _ = drawn(torch.contiguous_format)
    y = Normalise.apply(x, weight.detach(), bias.detach(), GROUPS, EPS)
    assert torch.autograd.gradcheck(lambda x: Normalise.apply(x, weight.detach(), bias.detach(), GROUPS, EPS), x)
    assert y.grad_fn.next_functions[1][0] is None


def test_heads_have_it_and_the_cpu_takes_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_detector(0, kind=GFLConfig)
    norms = [module for module in model.head.modules() if isinstance(module, torch.nn.GroupNorm)]
    assert len(norms) == 8
    assert all(type(norm) is GroupNorm for norm in norms)
    monkeypatch.setattr(Normalise, "apply", None)
    assert model(torch.rand(1, 3, 64, 64)).logits.isfinite().all()
