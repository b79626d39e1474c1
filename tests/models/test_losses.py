"""Loss functions against closed forms, and the division of parts."""

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import sigmoid_focal_loss

from crosskd_hf.models.assigners import Assignment
from crosskd_hf.models.losses import (
    LossPart,
    distribution_focal,
    distribution_kl,
    divide,
    focal_loss,
    integral,
    quality_focal,
    sum_normalizers,
)

LOGITS = torch.tensor([[-2.0, 0.0, 1.5], [3.0, -0.5, 0.25]])
TARGET = torch.tensor([[0.1, 0.5, 0.9], [0.0, 1.0, 0.3]])


BETAS = [0.0, 0.1, 0.5, 0.9, 1.0, 1.5, 2.0]


@pytest.mark.parametrize("beta", BETAS)
def test_quality_focal_is_its_closed_form(beta: float) -> None:
    score = 1 / (1 + torch.exp(-LOGITS.double()))
    entropy = -(TARGET * score.log() + (1 - TARGET) * (1 - score).log())
    expected = (TARGET - score).abs() ** beta * entropy
    torch.testing.assert_close(quality_focal(LOGITS, TARGET, beta).double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("beta", BETAS)
def test_quality_focal_is_at_rest_where_scores_agree(beta: float) -> None:
    logits = torch.cat([LOGITS, torch.tensor([[-200.0, 200.0, -100.0]])]).requires_grad_()
    target = logits.detach().sigmoid()
    loss = quality_focal(logits, target, beta)
    loss.sum().backward()
    torch.testing.assert_close(logits.grad, torch.zeros_like(logits), rtol=0, atol=1e-6)
    entropy = F.binary_cross_entropy_with_logits(logits.detach(), target, reduction="none")
    torch.testing.assert_close(loss.detach(), entropy if beta == 0 else torch.zeros_like(target), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_quality_focal_stays_finite_near_equal_scores(beta: float) -> None:
    """Differences of one rounding, and those too small for a normal float32."""
    target = torch.tensor([0.5, 0.25, 5e-44, 1e-38, 0.0])
    logits = torch.tensor([1e-7, -1.0986122, -100.0, -87.5, -200.0], requires_grad=True)
    loss = quality_focal(logits, target, beta)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert logits.grad.isfinite().all()
    assert loss.detach().max() < 0.7 * 1e-6**beta


@pytest.mark.parametrize("beta", [0.5, 1.0, 1.5])
def test_quality_focal_derives_its_modulating_factor(beta: float) -> None:
    logits = LOGITS.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: quality_focal(x, TARGET, beta), logits, eps=1e-3, atol=1e-3)


def test_focal_loss_counts_each_row_by_its_weight() -> None:
    """A positive of class 1, a negative, and a row that is ignored."""
    positive, weight = torch.tensor([[True, False, False]]), torch.tensor([[1.0, 1.0, 0.0]])
    assignment = Assignment(positive, weight, torch.zeros(1, 3, 4), torch.tensor([[1, 0, 0]]))
    logits = torch.stack([*LOGITS, LOGITS[0]])[None]
    target = torch.zeros(2, 3)
    target[0, 1] = 1
    torch.testing.assert_close(focal_loss(logits, assignment), sigmoid_focal_loss(LOGITS, target, reduction="sum"))


def test_distribution_focal_is_a_weighted_cross_entropy() -> None:
    logits = torch.randn(5, 8)
    target = torch.tensor([0.0, 1.25, 3.5, 6.0, 6.9])
    left = target.floor().long()
    expected = (left + 1 - target) * F.cross_entropy(logits, left, reduction="none")
    expected += (target - left) * F.cross_entropy(logits, left + 1, reduction="none")
    torch.testing.assert_close(distribution_focal(logits, target), expected)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 10.0])
def test_distribution_kl_is_torchs(temperature: float) -> None:
    logits, target = torch.randn(6, 17, requires_grad=True), torch.randn(6, 17, requires_grad=True)
    loss = distribution_kl(logits, target, temperature)
    expected = F.kl_div(
        (logits / temperature).log_softmax(-1), (target / temperature).softmax(-1), reduction="none"
    ).sum(-1)
    torch.testing.assert_close(loss, expected * temperature**2, rtol=1e-4, atol=1e-5)
    loss.sum().backward()
    assert target.grad is None
    assert not distribution_kl(target, target, temperature).any()


def test_integral_is_the_expected_bin() -> None:
    logits = torch.full((2, 17), -1e4)
    logits[0, 5] = 0
    logits[1, [0, 16]] = 0
    torch.testing.assert_close(integral(logits), torch.tensor([5.0, 8.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [100.0, -100.0])
def test_extreme_logits_stay_finite_with_their_gradients(value: float, dtype: torch.dtype) -> None:
    logits = torch.full((4, 17), value, dtype=dtype)
    logits[:, ::2] *= -1
    logits.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        losses = [
            quality_focal(logits, torch.full((4, 17), 0.5), 1.0).sum(),
            distribution_focal(logits, torch.tensor([0.0, 3.2, 9.9, 15.9])).sum(),
            distribution_kl(logits, -logits).sum(),
            integral(logits).sum(),
        ]
    loss = torch.stack(losses)
    loss.sum().backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite().all()
    assert logits.grad.isfinite().all()


class TestDivide:
    @staticmethod
    def part(total: float, normalizer: float, floor: float = 1.0) -> LossPart:
        return LossPart(torch.tensor(total), torch.tensor(normalizer), floor)

    def test_divides_each_part_by_its_own_normalizer(self) -> None:
        losses = divide({"a": self.part(6.0, 3.0), "b": self.part(1.0, 4.0)})
        assert {key: value.item() for key, value in losses.items()} == {"a": 2.0, "b": 0.25}

    def test_twice_the_normalizer_is_half_the_loss(self) -> None:
        assert divide({"a": self.part(6.0, 6.0)})["a"] * 2 == divide({"a": self.part(6.0, 3.0)})["a"]

    @pytest.mark.parametrize(("floor", "expected"), [(1.0, 5.0), (0.1, 50.0), (1e-6, 5e6)])
    def test_floor(self, floor: float, expected: float) -> None:
        assert divide({"a": self.part(5.0, 0.0, floor)})["a"].item() == pytest.approx(expected)

    def test_the_average_of_micro_batches_is_the_whole_batch(self) -> None:
        micro = [{"a": self.part(6.0, 1.0)}, {"a": self.part(2.0, 3.0)}]
        together = sum(sum_normalizers(parts) for parts in micro)
        losses = [divide(parts, together, averaged=2)["a"].item() for parts in micro]
        assert sum(losses) / 2 == pytest.approx((6 + 2) / (1 + 3))

    def test_nothing_to_divide(self) -> None:
        assert divide({}) == {}
