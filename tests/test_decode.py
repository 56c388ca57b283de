"""The decoder's kernel against float64: shapes, dtypes, repeated indices, NaN, residuals and snapshots."""

from __future__ import annotations

import pytest
import torch
from fastsae_kernels import gpu, reference, sparse_configs
from fastsae_kernels.act_grad import act_grad
from fastsae_kernels.decode import decode, decode_residual
from fastsae_kernels.testing import assert_no_worse
from torch import Tensor

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [  # N, D, L, K
    (1, 1, 1, 1),
    (1, 7, 123, 5),
    (7, 123, 1, 3),
    (3, 255, 11, 11),
    (5, 507, 37, 33),
    (9, 16, 255, 1),
]


def code(N: int, L: int, K: int, device: str, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Activations [N, K] of either sign, some 0, and indices [N, K] that may repeat."""
    gen = torch.Generator().manual_seed(seed)
    acts = torch.randn(N, K, generator=gen) * (torch.rand(N, K, generator=gen) > 0.2)
    return acts.to(device), torch.randint(0, L, (N, K), generator=gen).to(device)


def normal(*shape: int, dtype: torch.dtype, device: str, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def floor(K: int, dtype: torch.dtype) -> float:
    """Another order of summing K float32 products; and Triton's interpreter truncates where it stores bfloat16."""
    return (K + 2) * 2.0**-24 + (2.0**-7 if dtype == torch.bfloat16 and gpu.interpreting() else 0.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_no_worse_than_torch(shape, with_bias, dtype, device):
    N, D, L, K = shape
    acts, indices = code(N, L, K, device)
    W_dec = normal(L, D, dtype=dtype, device=device)
    b_dec = normal(D, dtype=dtype, device=device, seed=2) if with_bias else None
    out = decode(acts, indices, W_dec, b_dec)
    assert out.dtype == dtype
    assert out.shape == (N, D)
    truth = reference.sparse_decode(
        acts.double(), indices, W_dec.double(), None if b_dec is None else b_dec.double()
    )  # fmt: skip
    assert_no_worse(out, reference.sparse_decode(acts, indices, W_dec, b_dec), truth, floor=floor(K, dtype))


def test_index_dtypes_and_strides_do_not_matter(device):
    acts, indices = code(6, 20, 9, device)
    W_dec = normal(20, 40, dtype=torch.float32, device=device)
    expected = decode(acts, indices, W_dec, None)
    assert torch.equal(decode(acts, indices.int(), W_dec, None), expected)
    strided = decode(acts.t().contiguous().t(), indices.t().contiguous().t(), W_dec.t().contiguous().t(), None)
    assert torch.equal(strided, expected)


def test_repeated_indices_add_up(device):
    acts = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]], device=device)
    W_dec = torch.arange(12.0, device=device).view(3, 4)
    out = decode(acts, torch.full((2, 3), 2, device=device), W_dec, None)
    assert out.tolist() == (torch.tensor([[7.0], [56.0]]) * torch.arange(8.0, 12.0)).tolist()


def test_zero_activations_load_nothing_and_nan_reaches_its_token(device):
    acts, indices = code(4, 10, 5, device)
    W_dec = normal(10, 33, dtype=torch.float32, device=device)
    W_dec[7] = torch.inf
    indices[indices == 7] = 6
    indices[0, 0], acts[0, 0] = 7, 0.0
    acts[2, 3] = torch.nan
    out = decode(acts, indices, W_dec, None)
    assert out[2].isnan().all()
    assert out[[0, 1, 3]].isfinite().all()


def test_no_tokens(device):
    acts, indices = code(0, 10, 5, device)
    W_dec = normal(10, 33, dtype=torch.bfloat16, device=device)
    assert decode(acts, indices, W_dec, None).shape == (0, 33)
    assert decode_residual(acts, indices, W_dec, None, W_dec[:0], torch.float32).sse.sum() == 0
    assert act_grad(W_dec[:0], indices, W_dec).shape == (0, 5)


def test_two_runs_agree_bitwise(device):
    acts, indices = code(17, 100, 31, device)
    W_dec = normal(100, 123, dtype=torch.float32, device=device)
    assert torch.equal(decode(acts, indices, W_dec, None), decode(acts, indices, W_dec, None))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("N", "D", "L", "K", "first_k"), [(3, 507, 37, 20, None), (5, 130, 64, 36, 9), (1, 7, 9, 2, 1)]
)
def test_residual_and_its_error(N, D, L, K, first_k, dtype, device):
    acts, indices = code(N, L, K, device)
    W_dec, b_dec = normal(L, D, dtype=dtype, device=device), normal(D, dtype=torch.float32, device=device)
    target = normal(N, D, dtype=dtype, device=device, seed=3)
    residual, sse = decode_residual(acts, indices, W_dec, b_dec, target, dtype, first_k=first_k)
    assert residual.dtype == dtype
    assert sse.dtype == torch.float32
    if first_k is None:
        residual, sse = residual[None], sse[None]
    for k, e, error in zip([K] if first_k is None else [first_k, K], residual, sse, strict=True):
        wide = reference.sparse_decode(acts[:, :k], indices[:, :k], W_dec.float(), b_dec) - target.float()
        truth = reference.sparse_decode(acts[:, :k].double(), indices[:, :k], W_dec.double(), b_dec.double())
        truth -= target.double()
        assert_no_worse(e, wide.to(dtype), truth, floor=floor(K, dtype))
        # the squared error is summed before the residual is rounded: float32 throughout, whatever the dtype
        expected = truth.square().sum(1)
        assert_no_worse(error.sum(1), wide.square().sum(1), expected, floor=(K + D) * 2.0**-24)


def test_nan_reaches_the_squared_error_of_its_token(device):
    acts, indices = code(3, 10, 4, device)
    acts[1, 2] = torch.nan
    W_dec = normal(10, 20, dtype=torch.float32, device=device)
    sse = decode_residual(acts, indices, W_dec, None, W_dec[:3], torch.float32).sse.sum(1)
    assert sse.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("first_k", [0, 4, -1])
def test_first_k_outside_is_refused(first_k, device):
    acts, indices = code(3, 10, 4, device)
    W_dec = normal(10, 20, dtype=torch.float32, device=device)
    with pytest.raises(ValueError, match=rf"1 <= first_k < K = 4, got {first_k}"):
        decode_residual(acts, indices, W_dec, None, W_dec[:3], torch.float32, first_k=first_k)


def test_float64_is_refused_with_the_way_out(device):
    acts, indices = code(3, 10, 4, device)
    W_dec = normal(10, 20, dtype=torch.float64, device=device)
    with pytest.raises(ValueError, match='implementation="reference"'):
        decode(acts, indices, W_dec, None)
    with pytest.raises(ValueError, match='implementation="reference"'):
        act_grad(W_dec[:3], indices, W_dec)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_act_grad_no_worse_than_torch(shape, dtype, device):
    N, D, L, K = shape
    _, indices = code(N, L, K, device)
    W_dec, grad = (normal(n, D, dtype=dtype, device=device, seed=n) for n in (L, N))
    d_acts = act_grad(grad, indices.int(), W_dec)
    assert d_acts.dtype == torch.float32
    truth = torch.einsum("nd,nkd->nk", grad.double(), W_dec[indices].double())
    plain = torch.einsum("nd,nkd->nk", grad.float(), W_dec[indices].float())
    assert_no_worse(d_acts, plain, truth, floor=(D + 2) * 2.0**-24)  # another order of summing D products


@pytest.mark.parametrize(("D", "L", "itemsize", "BLOCK_D"), [
    (768, 24576, 2, 128), (4096, 131072, 2, 64), (2048, 65536, 2, 64), (768, 24576, 4, 64), (576, 1000, 2, 128),
    (192, 1000, 2, 64), (7, 9, 4, 16),
])  # fmt: skip
def test_slabs_fit_into_the_cache(D, L, itemsize, BLOCK_D):
    assert sparse_configs.decode_config(D, L, 64, itemsize).BLOCK_D == BLOCK_D
