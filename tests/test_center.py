"""Activations less a row, and their squared distance from it, beside float64; odd sizes and tiles' edges."""

import pytest
import torch
from fastsae_kernels import center, reference

from fastsae import loss

SHAPES = [(1, 1), (7, 33), (17, 512), (9, 700)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_center_is_the_references(device, shape, dtype):
    x, shift = torch.randn(shape, device=device).to(dtype), torch.randn(shape[1], device=device)
    expected = reference.center(x, shift)
    assert torch.equal(center.center(x, shift), expected)
    assert torch.equal(center.center(x.T.contiguous().T, shift), center.center(x, shift))


@pytest.mark.parametrize("shape", SHAPES)
def test_squared_distance(device, shape):
    x, shift = 100 + torch.randn(shape, device=device), 100 + torch.randn(shape[1], device=device)
    expected = (x.double() - shift.double()).square().sum()
    torch.testing.assert_close(center.squared_distance(x, shift).double(), expected, rtol=1e-6, atol=0)


def test_no_rows(device):
    x, shift = torch.empty(0, 5, device=device), torch.ones(5, device=device)
    assert center.center(x, shift).shape == (0, 5)
    assert center.squared_distance(x, shift) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_losses_denominator_on_a_gpu():
    y = (5 + torch.randn(300, 700, device="cuda")).to(torch.bfloat16)
    exact = y.double()
    expected = (exact - exact.mean(0)).square().sum()
    torch.testing.assert_close(loss.total_variance(y).double(), expected, rtol=1e-5, atol=0)
    assert loss.total_variance(y.float().requires_grad_()).requires_grad
