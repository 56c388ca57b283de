"""The differentiable public functions: every implementation's gradients against float64 autograd of the reference."""

from __future__ import annotations

import pytest
import torch
from fastsae_kernels import operators, reference, sparse_decode, topk_encode
from fastsae_kernels.testing import Inputs, assert_no_worse, make_inputs
from torch import Tensor

N, D, L, K = 5, 12, 35, 7  # GroupMax: 7 groups of 5
FLOOR = 4 * N * K * 2.0**-24  # other orders of summing up to N·K products of activations that differ likewise
FAST = ["cpu", "triton"]


@pytest.fixture(params=["reference", *FAST])
def implementation(request) -> str:
    return request.param


@pytest.fixture
def place(implementation, device) -> str:
    """Where this implementation's tensors live."""
    return "cpu" if implementation == "cpu" else device


def leaves_of(tensors, dtype: torch.dtype) -> list[Tensor]:
    return [t.detach().to(dtype).requires_grad_() for t in tensors]


def loss_of(out: Tensor, seed: int = 0) -> Tensor:
    """A loss whose gradient in ``out`` is different everywhere."""
    return (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(out.device)).sum()


def encode_gradients(inputs: Inputs, dtype: torch.dtype, implementation: str, **options) -> list[Tensor]:
    """Gradients in x, weight, bias and b_dec of a loss of every differentiable output."""
    leaves = leaves_of((inputs.x, inputs.weight, inputs.bias, inputs.b_dec), dtype)
    x, weight, bias, b_dec = leaves
    out = topk_encode(x, weight, bias, K, b_dec=b_dec, implementation=implementation, **options)
    assert not out.top_indices.requires_grad
    loss = loss_of(out.top_acts)
    if out.pre_acts is not None:
        loss = loss + loss_of(out.pre_acts, seed=1)
    return list(torch.autograd.grad(loss, leaves))


def decode_gradients(top_indices: Tensor, tensors, dtype: torch.dtype, implementation: str) -> list[Tensor]:
    """Gradients in top_acts, W_dec and b_dec."""
    leaves = leaves_of(tensors, dtype)
    out = sparse_decode(leaves[0], top_indices, leaves[1], leaves[2], implementation=implementation)
    return list(torch.autograd.grad(loss_of(out), leaves))


def assert_all_no_worse(actual: list[Tensor], by_torch: list[Tensor], truth: list[Tensor]) -> None:
    for value, plain, exact in zip(actual, by_torch, truth, strict=True):
        assert value.shape == exact.shape
        assert value.dtype == plain.dtype
        assert exact.any()
        assert_no_worse(value, plain, exact, floor=FLOOR)


def a_code(device: str) -> tuple[Tensor, Tensor]:
    """Activations with zeros and negatives, and indices that repeat within a token; [N, K]."""
    gen = torch.Generator().manual_seed(3)
    acts = torch.randn(N, K, generator=gen) * (torch.rand(N, K, generator=gen) > 0.3)
    return acts.to(device), torch.randint(0, 10, (N, K), generator=gen).to(device)


# ---- the reference itself


@pytest.mark.parametrize("activation", ["topk", "groupmax"])
def test_gradcheck_of_the_reference_encoder(activation):
    inputs = make_inputs(4, 5, 12, dtype=torch.float64)

    def encode(x, weight, bias, b_dec):
        out = reference.topk_encode(x, weight, bias, 3, b_dec=b_dec, activation=activation, return_pre_acts=True)
        assert out.pre_acts is not None
        return out.top_acts, out.pre_acts

    leaves = leaves_of((inputs.x, inputs.weight, inputs.bias, inputs.b_dec), torch.float64)
    assert torch.autograd.gradcheck(encode, leaves)


def test_gradcheck_of_the_reference_decoder():
    top_indices = torch.tensor([[0, 1, 1], [2, 11, 3], [4, 4, 4], [7, 0, 5]])
    gen = torch.Generator().manual_seed(0)
    tensors = [torch.randn(s, generator=gen, dtype=torch.float64) for s in ((4, 3), (12, 5), (5,))]

    def decode(top_acts, W_dec, b_dec):
        return reference.sparse_decode(top_acts, top_indices, W_dec, b_dec)

    assert torch.autograd.gradcheck(decode, leaves_of(tensors, torch.float64))


# ---- encode


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("return_pre_acts", [False, True])
@pytest.mark.parametrize("activation", ["topk", "groupmax"])
def test_encode_gradients(implementation, activation, return_pre_acts, masked, place):
    inputs = make_inputs(N, D, L, device=place)
    options = {
        "activation": activation,
        "return_pre_acts": return_pre_acts,
        "latent_mask": torch.arange(L, device=place) % 3 > 0 if masked else None,
    }
    truth = encode_gradients(inputs, torch.float64, "reference", **options)
    by_torch = encode_gradients(inputs, torch.float32, "reference", **options)
    assert_all_no_worse(encode_gradients(inputs, torch.float32, implementation, **options), by_torch, truth)


def test_selected_zeros_get_no_gradient(implementation, place):
    inputs = make_inputs(N, D, L, device=place)
    inputs = inputs._replace(bias=inputs.bias - 2)
    out = topk_encode(inputs.x, inputs.weight, inputs.bias, K, b_dec=inputs.b_dec, implementation=implementation)
    assert 0 < (out.top_acts == 0).sum() < out.top_acts.numel()
    actual = encode_gradients(inputs, torch.float32, implementation)
    fired = torch.zeros(L, dtype=torch.bool, device=place)
    fired[out.top_indices[out.top_acts > 0]] = True
    assert not fired[out.top_indices].all()  # some latents were selected as zeros only
    for grad in actual[1:3]:
        assert (grad[~fired] == 0).all()
        assert (grad[fired] != 0).any(-1).all()
    truth = encode_gradients(inputs, torch.float64, "reference")
    assert_all_no_worse(actual, encode_gradients(inputs, torch.float32, "reference"), truth)


def test_gradients_come_in_each_inputs_own_dtype(implementation, place):
    inputs = make_inputs(N, D, L, device=place)
    x, weight = inputs.x.bfloat16().requires_grad_(), inputs.weight.requires_grad_()
    bias, b_dec = inputs.bias.bfloat16().requires_grad_(), inputs.b_dec.requires_grad_()
    out = topk_encode(x, weight, bias, K, b_dec=b_dec, implementation=implementation)
    assert out.top_acts.dtype == torch.float32
    W_dec = inputs.W_dec.bfloat16().requires_grad_()
    x_hat = sparse_decode(out.top_acts, out.top_indices, W_dec, b_dec, implementation=implementation)
    assert x_hat.dtype == torch.bfloat16
    loss_of(x_hat).backward()
    for leaf in (x, weight, bias, b_dec, W_dec):
        assert leaf.grad is not None
        assert leaf.grad.dtype == leaf.dtype
        assert leaf.grad.any()
        assert leaf.grad.isfinite().all()


# ---- decode


def test_decode_gradients_with_zeros_and_repeated_indices(implementation, place):
    top_acts, top_indices = a_code(place)
    inputs = make_inputs(N, D, L, device=place)
    tensors = (top_acts, inputs.W_dec, inputs.b_dec)
    truth = decode_gradients(top_indices, tensors, torch.float64, "reference")
    by_torch = decode_gradients(top_indices, tensors, torch.float32, "reference")
    actual = decode_gradients(top_indices, tensors, torch.float32, implementation)
    assert_all_no_worse(actual, by_torch, truth)
    assert actual[0][top_acts == 0].all()  # a zero activation has a gradient: it could grow
    assert (actual[1][10:] == 0).all()  # nobody picked these latents


@pytest.mark.parametrize("frozen", [False, True])
def test_int32_indices(implementation, frozen, place):
    top_acts, top_indices = a_code(place)
    W_dec = make_inputs(N, D, L, device=place).W_dec.requires_grad_(not frozen)
    gradients = []
    for indices in (top_indices, top_indices.int()):
        acts = top_acts.clone().requires_grad_()
        out = sparse_decode(acts, indices, W_dec, implementation=implementation)
        gradients.append((out.detach(), *torch.autograd.grad(loss_of(out), [acts] if frozen else [acts, W_dec])))
    for wide, narrow in zip(*gradients, strict=True):
        assert torch.equal(wide, narrow)


def test_gradient_that_is_one_number_everywhere(implementation, place):
    top_acts, top_indices = a_code(place)
    acts, W_dec = top_acts.requires_grad_(), make_inputs(N, D, L, device=place).W_dec
    sparse_decode(acts, top_indices, W_dec, implementation=implementation).sum().backward()  # arrives expanded
    assert acts.grad is not None
    torch.testing.assert_close(acts.grad, W_dec.sum(1)[top_indices])


# ---- what is not asked for is not computed


def refuse(*args, **kwargs):
    raise AssertionError("this primitive must not run")


@pytest.mark.parametrize(("leaf", "forbidden"), [
    ("x", "encode_backward"), ("weight", "decode"), ("bias", "decode"), ("b_dec", "decode"),
])  # fmt: skip
@pytest.mark.parametrize("implementation", FAST)
def test_encode_runs_only_what_its_leaf_needs(implementation, leaf, forbidden, monkeypatch, place):
    inputs = make_inputs(N, D, L, device=place)
    given = {name: getattr(inputs, name) for name in ("x", "weight", "bias", "b_dec")}
    given[leaf].requires_grad_()
    everything = dict(zip(given, encode_gradients(inputs, torch.float32, implementation), strict=True))
    out = topk_encode(**given, k=K, implementation=implementation)
    monkeypatch.setattr(operators.backend(implementation), forbidden, refuse)
    loss_of(out.top_acts).backward()
    assert torch.equal(given[leaf].grad, everything[leaf])
    assert all(t.grad is None for name, t in given.items() if name != leaf)


@pytest.mark.parametrize("trained", [("bias",), ("b_dec",), ("bias", "b_dec"), ("x", "b_dec")])
@pytest.mark.parametrize("implementation", FAST)
def test_frozen_encoder_makes_no_gradient_of_its_size(implementation, trained, monkeypatch, place):
    inputs = make_inputs(N, D, L, device=place)
    given = {name: getattr(inputs, name) for name in ("x", "weight", "bias", "b_dec")}
    truth = dict(zip(given, encode_gradients(inputs, torch.float64, "reference"), strict=True))
    by_torch = dict(zip(given, encode_gradients(inputs, torch.float32, "reference"), strict=True))
    module = operators.backend(implementation)
    made, right = [], module.encode_backward
    monkeypatch.setattr(module, "encode_backward", lambda *tensors: made.append(right(*tensors)) or made[-1])
    for name in trained:
        given[name].requires_grad_()
    loss_of(topk_encode(**given, k=K, implementation=implementation).top_acts).backward()
    assert [tuple(d_weight.shape) for d_weight, _ in made] == [(L, 1)]
    for name, leaf in given.items():
        if name in trained:
            assert_no_worse(leaf.grad, by_torch[name], truth[name], floor=FLOOR)
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("implementation", FAST)
def test_frozen_decoder_makes_no_gradient_of_its_size(implementation, monkeypatch, place):
    top_acts, top_indices = a_code(place)
    W_dec = make_inputs(N, D, L, device=place).W_dec
    monkeypatch.setattr(operators.backend(implementation), "decode_backward", refuse)
    acts = top_acts.double().requires_grad_()
    loss_of(reference.sparse_decode(acts, top_indices, W_dec.double())).backward()
    actual = top_acts.clone().requires_grad_()
    loss_of(sparse_decode(actual, top_indices, W_dec, implementation=implementation)).backward()
    assert actual.grad is not None
    assert acts.grad is not None
    torch.testing.assert_close(actual.grad.double(), acts.grad, rtol=0, atol=float(acts.grad.abs().max()) * FLOOR)
    assert W_dec.grad is None


def test_frozen_activations(implementation, place):
    top_acts, top_indices = a_code(place)
    W_dec = make_inputs(N, D, L, device=place).W_dec.requires_grad_()
    loss_of(sparse_decode(top_acts, top_indices, W_dec, implementation=implementation)).backward()
    assert top_acts.grad is None
    assert W_dec.grad is not None
    assert W_dec.grad[top_indices.unique()].any()


def test_nothing_to_differentiate(implementation, place):
    inputs = make_inputs(N, D, L, device=place)
    out = topk_encode(inputs.x, inputs.weight, inputs.bias, K, implementation=implementation)
    assert not out.top_acts.requires_grad
    assert not sparse_decode(*out[:2], inputs.W_dec, implementation=implementation).requires_grad


# ---- refusals


@pytest.mark.parametrize(("change", "message"), [
    ({"x": torch.zeros(D)}, r"expected x \[N, D\], weight \[L, D\], bias \[L\], got \[12\], \[35, 12\], \[35\]"),
    ({"x": torch.zeros(N, D + 1)}, r"got \[5, 13\], \[35, 12\], \[35\]"),
    ({"weight": torch.zeros(L, D, 1)}, r"got \[5, 12\], \[35, 12, 1\], \[35\]"),
    ({"bias": torch.zeros(L - 1)}, r"got \[5, 12\], \[35, 12\], \[34\]"),
    ({"k": 0}, r"1 <= k <= number of latents \(35\), got k = 0"),
    ({"k": L + 1}, r"1 <= k <= number of latents \(35\), got k = 36"),
    ({"activation": "batchtopk"}, "expected activation 'topk' or 'groupmax', got 'batchtopk'"),
    ({"activation": "groupmax", "k": 8}, "groupmax needs latents divisible by k, got 35 latents, k = 8"),
    ({"b_dec": torch.zeros(L)}, r"expected b_dec \[12\], got \[35\]"),
    ({"latent_mask": torch.ones(L)}, r"expected latent_mask bool \[35\], got torch.float32 \[35\]"),
    ({"latent_mask": torch.ones(D, dtype=torch.bool)}, r"expected latent_mask bool \[35\], got torch.bool \[12\]"),
])  # fmt: skip
def test_encode_says_what_does_not_fit(implementation, change, message):
    inputs = make_inputs(N, D, L)
    arguments = {"x": inputs.x, "weight": inputs.weight, "bias": inputs.bias, "k": K}
    with pytest.raises(ValueError, match=message):
        topk_encode(**(arguments | change), implementation=implementation)


@pytest.mark.parametrize(("acts", "indices", "W_dec", "got"), [
    ((N, K), (N, K + 1), (L, D), r"got \[5, 7\], \[5, 8\], \[35, 12\]"),
    ((K,), (K,), (L, D), r"got \[7\], \[7\], \[35, 12\]"),
    ((N, K), (N, K), (L,), r"got \[5, 7\], \[5, 7\], \[35\]"),
])  # fmt: skip
def test_decode_says_what_does_not_fit(implementation, acts, indices, W_dec, got):
    with pytest.raises(ValueError, match=got):
        sparse_decode(
            torch.zeros(acts), torch.zeros(indices, dtype=torch.int64), torch.zeros(W_dec),
            implementation=implementation,
        )  # fmt: skip


def test_unknown_implementation():
    inputs = make_inputs(N, D, L)
    with pytest.raises(ValueError, match="expected one of .*'triton', 'cpu', 'reference'.*, got 'cuda'"):
        topk_encode(inputs.x, inputs.weight, inputs.bias, K, implementation="cuda")


@pytest.mark.parametrize("primitive", ["encode", "decode", "select", "encode_backward", "decode_backward", "act_grad"])
def test_kernels_launch_where_their_tensors_are(primitive, monkeypatch, device):
    inputs = make_inputs(2, 4, 6, device=device)
    acts, indices = torch.ones(2, 3, device=device), torch.ones(2, 3, dtype=torch.int64, device=device)
    arguments = {
        "encode": (inputs.x, inputs.weight, inputs.bias, 3, "topk", None),
        "decode": (acts, indices, inputs.W_dec, None),
        "select": (inputs.weight.relu(), 2, "topk"),
        "encode_backward": (acts, indices, inputs.x, 6),
        "decode_backward": (inputs.x, acts, indices, inputs.W_dec),
        "act_grad": (inputs.x, indices, inputs.W_dec),
    }[primitive]
    made_current = []
    device_of = torch.cuda.device_of
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: made_current.append(tensor) or device_of(tensor))
    getattr(operators.backend("triton"), primitive)(*arguments)
    assert made_current == [arguments[0]]
