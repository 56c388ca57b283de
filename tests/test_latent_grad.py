"""The latent-major backward at fixed indices, against float64 autograd of the reference."""

from __future__ import annotations

import importlib
from typing import NamedTuple

import pytest
import torch
from fastsae_kernels import reference, sparse_configs
from fastsae_kernels.backward import coder_backward, decode_backward, encode_backward
from fastsae_kernels.by_latent import by_latent
from fastsae_kernels.latent_grad import latent_grad
from fastsae_kernels.testing import assert_no_worse
from torch import Tensor

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [  # N, D, L, K
    (1, 1, 1, 1),
    (1, 7, 12, 5),
    (7, 123, 3, 2),
    (3, 255, 11, 11),
    (5, 507, 13, 9),
    (33, 16, 20, 1),
]


class Step(NamedTuple):
    """A coder's backward: what it is given."""

    x: Tensor  # [N, D]
    grad: Tensor  # [N, D]
    W_enc: Tensor  # [L, D]
    b_enc: Tensor  # [L]
    W_dec: Tensor  # [L, D]
    top_indices: Tensor  # [N, K]
    top_acts: Tensor  # [N, K]: ReLU of the scores, about half of them 0


class Grads(NamedTuple):
    """``LatentGrads`` with everything there."""

    d_acts: Tensor
    dW_dec: Tensor
    dW_enc: Tensor
    db_enc: Tensor


def make_step(shape: tuple[int, ...], device: str, dtype=torch.float32, top_indices=None) -> Step:
    N, D, L, K = shape
    gen = torch.Generator().manual_seed(N + D + L + K)
    shapes = [(N, D), (N, D), (L, D), (L,), (L, D)]
    x, grad, W_enc, b_enc, W_dec = (torch.randn(s, generator=gen).to(device, dtype) for s in shapes)
    if top_indices is None:
        top_indices = torch.randint(0, L, (N, K), generator=gen)  # repeats within a token happen
    top_indices = top_indices.to(device)
    top_acts = reference.scores(x, W_enc, b_enc).relu().gather(1, top_indices)
    return Step(x, grad, W_enc, b_enc, W_dec, top_indices, top_acts)


def autograd_of_reference(step: Step, dtype: torch.dtype) -> Grads:
    """Gradients of <grad, decode(encode(x))> in ``dtype`` at the step's indices; d_acts behind ReLU's mask."""
    x, grad, W_dec = (t.to(dtype) for t in (step.x, step.grad, step.W_dec))
    leaves = [step.W_enc.to(dtype).requires_grad_(), step.b_enc.to(dtype).requires_grad_(), W_dec.requires_grad_()]
    chosen = reference.scores(x, leaves[0], leaves[1]).gather(1, step.top_indices)
    out = reference.sparse_decode(chosen.relu(), step.top_indices, leaves[2])
    d_acts, dW_enc, db_enc, dW_dec = torch.autograd.grad((out * grad).sum(), [chosen, *leaves])
    return Grads(d_acts, dW_dec, dW_enc, db_enc)


def assert_grads(actual: Grads, step: Step) -> None:
    """Each no worse than float32 autograd. Floor: other orders of summing D products, then up to N·K pairs."""
    floor = (step.x.shape[1] + step.top_acts.numel() + 2) * 2.0**-24
    truth, plain = autograd_of_reference(step, torch.float64), autograd_of_reference(step, torch.float32)
    for name, value, exact, by_torch in zip(Grads._fields, actual, truth, plain, strict=True):
        assert value.dtype == torch.float32, name
        assert value.shape == exact.shape, name
        assert_no_worse(value, by_torch, exact, floor=floor)


def backward(step: Step, **options) -> Grads:
    grads = coder_backward(
        step.grad, step.top_acts, step.top_indices, step.x, step.W_dec, return_d_acts=True, **options
    )  # fmt: skip
    assert all(t is not None for t in grads)
    return Grads(*grads)  # pyright: ignore[reportArgumentType]


def assert_equal_bitwise(one: Grads, other: Grads) -> None:
    for name, a, b in zip(Grads._fields, one, other, strict=True):
        assert torch.equal(a, b), name


def zipf(N: int, K: int, L: int) -> Tensor:
    """Indices where latent l fires about 1 / (l + 1) as often as latent 0."""
    weights = 1 / torch.arange(1.0, L + 1)
    return torch.multinomial(weights, N * K, replacement=True, generator=torch.Generator().manual_seed(0)).view(N, K)


# ---- the training step: everything in one pass


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_coder_backward(shape, dtype, device):
    step = make_step(shape, device, dtype)
    assert_grads(backward(step), step)


def test_relu_masks_what_the_encoder_gets(device):
    step = make_step((7, 16, 9, 4), device)
    masked = step.top_acts == 0
    assert 0 < masked.sum() < masked.numel()
    d_acts = backward(step).d_acts
    assert (d_acts[masked] == 0).all()
    assert (d_acts[~masked] != 0).all()


def test_pairs_outside_the_index_get_zero(device):
    step = make_step((7, 16, 9, 4), device)
    some = step.top_acts.clone()
    some[::2] = 0
    d_acts = latent_grad(
        by_latent(step.top_indices, some, 9), (7, 4, 9, 16),
        grad_out=step.grad, top_acts=step.top_acts, W_dec=step.W_dec, return_d_acts=True,
    ).d_acts  # fmt: skip
    assert d_acts is not None
    assert torch.equal(d_acts, backward(step).d_acts.masked_fill(some == 0, 0.0))


def test_latents_nobody_picked_get_exactly_zero(device):
    step = make_step((9, 40, 50, 3), device)
    picked = torch.zeros(50, dtype=torch.bool, device=device)
    picked[step.top_indices[step.top_acts > 0]] = True
    _, dW_dec, dW_enc, db_enc = backward(step)
    for grad in (dW_dec, dW_enc, db_enc):
        assert (grad[~picked] == 0).all()
        assert (grad[picked] != 0).any(-1).all()


def test_all_tokens_on_one_latent(device):
    step = make_step((300, 24, 4, 1), device, top_indices=torch.full((300, 1), 2))
    assert len(by_latent(step.top_indices, None, 4).chunk_latents) == 4  # split: full chunks and a remainder
    assert_grads(backward(step), step)


@pytest.mark.parametrize("split", [1, 4, 9])
def test_zipf_splits_hot_latents(split, monkeypatch, device):
    monkeypatch.setattr(importlib.import_module("fastsae_kernels.by_latent"), "SPLIT", split)
    step = make_step((40, 33, 25, 3), device, top_indices=zipf(40, 3, 25))
    index = by_latent(step.top_indices, step.top_acts, 25)
    assert index.chunk_offsets.diff().max() > 1
    assert index.chunk_latents[-1] == 25  # the bound on the grid is not reached: some programs have nothing to do
    grads = backward(step)
    assert_grads(grads, step)
    assert_equal_bitwise(grads, backward(step, index=index))


def test_int32_indices_change_nothing(device):
    step = make_step((9, 20, 12, 4), device)
    assert_equal_bitwise(backward(step), backward(step._replace(top_indices=step.top_indices.int())))


@pytest.mark.parametrize(("D", "BLOCK_D"), [(40, 16), (123, 64), (8193, None)])
def test_rows_wider_than_the_registers(D, BLOCK_D, monkeypatch, device):
    if BLOCK_D:
        narrow = sparse_configs.LatentGradConfig(BLOCK_P=4, BLOCK_D=BLOCK_D, num_warps=1)
        module = importlib.import_module("fastsae_kernels.latent_grad")
        monkeypatch.setattr(module, "latent_grad_config", lambda D, itemsize: narrow)
    step = make_step((3, D, 4, 3), device)
    grads = backward(step)
    assert_grads(grads, step)
    d_acts, dW_dec = decode_backward(step.grad, step.top_acts, step.top_indices, step.W_dec)
    # other pairs share an iteration where zero activations are in the index: another order of summing 9 of them
    torch.testing.assert_close(dW_dec, grads.dW_dec, rtol=0, atol=9 * 2.0**-24 * float(dW_dec.abs().max()))
    assert torch.equal(d_acts.masked_fill(step.top_acts == 0, 0.0), grads.d_acts)


@pytest.mark.parametrize("wide", [False, True])
def test_multi_k_takes_two_gradients(wide, monkeypatch, device):
    if wide:
        slabs = sparse_configs.LatentGradConfig(BLOCK_P=2, BLOCK_D=16, num_warps=1)
        module = importlib.import_module("fastsae_kernels.latent_grad")
        monkeypatch.setattr(module, "latent_grad_config", lambda D, itemsize: slabs)
    step, first_k = make_step((9, 30, 12, 8), device), 3
    other = make_step((9, 30, 12, 1), device).grad
    few = step._replace(top_indices=step.top_indices[:, :first_k], top_acts=step.top_acts[:, :first_k])
    both = autograd_of_reference(step._replace(grad=other), torch.float64)
    first = autograd_of_reference(few, torch.float64)
    grads = backward(step._replace(grad=torch.stack([step.grad + other, other])), first_k=first_k)
    both.d_acts[:, :first_k] += first.d_acts
    truth = Grads(both.d_acts, *(a + b for a, b in zip(both[1:], first[1:], strict=True)))
    for value, exact in zip(grads, truth, strict=True):
        torch.testing.assert_close(value.double(), exact, rtol=0, atol=100 * 2.0**-24 * float(exact.abs().max()))


@pytest.mark.parametrize("D", [20, 8193])
def test_grad_scale_multiplies_the_gradient(D, device):
    step = make_step((3, D, 4, 2), device)
    scaled = backward(step, grad_scale=torch.tensor(0.25, device=device))
    assert_equal_bitwise(scaled, Grads(*(0.25 * t for t in backward(step))))  # a power of two is exact


def test_nan_activation_reaches_its_latent_only(device):
    step = make_step((6, 12, 7, 2), device)
    step.top_indices[:] = torch.arange(2, device=device)
    step.top_indices[3, 1], step.top_acts[3, 1] = 5, torch.nan
    dW_dec = backward(step).dW_dec
    assert dW_dec[5].isnan().all()
    assert dW_dec[[0, 1, 2, 3, 4, 6]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_runs_agree_bitwise(dtype, monkeypatch, device):
    monkeypatch.setattr(importlib.import_module("fastsae_kernels.by_latent"), "SPLIT", 16)
    step = make_step((99, 33, 5, 2), device, dtype, top_indices=zipf(99, 2, 5))
    assert by_latent(step.top_indices, step.top_acts, 5).chunk_offsets[-1] > 0  # the hot ones were split
    assert_equal_bitwise(backward(step), backward(step))


# ---- one side at a time: autograd


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_decode_backward_also_of_zero_activations(shape, dtype, device):
    step = make_step(shape, device, dtype)
    signs = torch.arange(shape[3], device=device) % 3 - 1  # a general operator: -1, 0 and 1 times the activation
    top_acts = step.top_acts * signs

    def autograd(dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [top_acts.to(dtype).requires_grad_(), step.W_dec.to(dtype).requires_grad_()]
        out = reference.sparse_decode(leaves[0], step.top_indices, leaves[1])
        return torch.autograd.grad((out * step.grad.to(dtype)).sum(), leaves)

    d_acts, dW_dec = decode_backward(step.grad, top_acts, step.top_indices, step.W_dec)
    assert d_acts.dtype == dW_dec.dtype == torch.float32
    floor = (shape[1] + top_acts.numel() + 2) * 2.0**-24  # other orders of summing D products, or up to N·K pairs
    for value, exact, by_torch in zip(
        (d_acts, dW_dec), autograd(torch.float64), autograd(torch.float32), strict=True
    ):  # fmt: skip
        assert_no_worse(value, by_torch, exact, floor=floor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_encode_backward(shape, dtype, device):
    step = make_step(shape, device, dtype)
    grads = backward(step)
    dW_enc, db_enc = encode_backward(grads.d_acts, step.top_indices, step.x, shape[2])
    assert_grads(grads._replace(dW_enc=dW_enc, db_enc=db_enc), step)


def test_no_tokens(device):
    step = make_step((0, 8, 5, 2), device)
    grads = backward(step)
    assert grads.d_acts.shape == (0, 2)
    assert all((t == 0).all() for t in grads[1:])
    assert grads.dW_dec.shape == grads.dW_enc.shape == (5, 8)


def test_float64_is_refused_with_the_way_out(device):
    step = make_step((3, 8, 5, 2), device, torch.float64)
    for refuses in (
        lambda: backward(step),
        lambda: decode_backward(step.grad, step.top_acts, step.top_indices, step.W_dec),
        lambda: encode_backward(step.top_acts, step.top_indices, step.x, 5),
    ):
        with pytest.raises(ValueError, match='implementation="reference"'):
            refuses()
