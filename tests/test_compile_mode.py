"""The primitives under ``torch.compile`` and FakeTensor: one graph, the same values, the promised shapes."""

from __future__ import annotations

import pytest
import torch
from fastsae_kernels import operators, sparse_decode, topk_encode
from fastsae_kernels.testing import make_inputs
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

N, D, L, K = 7, 12, 123, 5
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def roundtrip(x: Tensor, weight: Tensor, bias: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    out = topk_encode(x, weight, bias, K, b_dec=b_dec, implementation="cpu")
    return sparse_decode(out.top_acts, out.top_indices, W_dec, b_dec, implementation="cpu")


def outputs_and_gradients(function, dtype: torch.dtype, tokens: int = N) -> list[Tensor]:
    leaves = [t.requires_grad_() for t in make_inputs(tokens, D, L, dtype=dtype)]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


def primitives(dtype: torch.dtype) -> dict[str, tuple]:
    """Every registered operator with arguments for it."""
    x, weight, bias, W_dec, b_dec = make_inputs(N, D, L, dtype=dtype)
    acts, indices = operators.encode(x, weight, bias, None, K, "topk", "cpu")
    return {
        "encode": (x, weight, bias, torch.arange(L) % 2 == 0, K, "topk", "cpu"),
        "encode_backward": (acts, indices, x, L, "cpu"),
        "decode": (acts, indices, W_dec, b_dec, "cpu"),
        "decode_backward": (x, acts, indices, W_dec, "cpu"),
        "act_grad": (x, indices, W_dec, "cpu"),
        "select": (acts, 3, "topk", "cpu"),
    }


PRIMITIVES = ["encode", "encode_backward", "decode", "decode_backward", "act_grad", "select"]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_in_one_graph_equals_eager(dtype):
    compiled = torch.compile(roundtrip, fullgraph=True, backend="aot_eager")
    eager = outputs_and_gradients(roundtrip, dtype)
    for actual, expected in zip(outputs_and_gradients(compiled, dtype), eager, strict=True):
        assert actual.dtype == expected.dtype
        assert expected.any()
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)  # the same operators on the same operands


def test_another_number_of_tokens_does_not_recompile_twice():
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(roundtrip, fullgraph=True, backend=count, dynamic=True)
    for tokens in (7, 9, 12, 33):
        inputs = make_inputs(tokens, D, L)
        torch.testing.assert_close(compiled(*inputs), roundtrip(*inputs), rtol=0, atol=0)
    assert len(graphs) == 1


def test_dense_scores_compile_too():
    def scores_too(x, weight, bias):
        out = topk_encode(x, weight, bias, K, return_pre_acts=True, implementation="cpu")
        assert out.pre_acts is not None
        return out.top_acts.sum() + out.pre_acts.square().sum()

    inputs = make_inputs(N, D, L)[:3]
    compiled = torch.compile(scores_too, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), scores_too(*inputs), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PRIMITIVES)
def test_fake_outputs_are_shaped_like_real_ones(name, dtype):
    operator, args = getattr(operators, name), primitives(dtype)[name]
    real = operator(*args)
    with FakeTensorMode() as mode:
        fake = operator(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args))
    for r, f in zip(*((o if isinstance(o, tuple) else (o,)) for o in (real, fake)), strict=True):
        assert (f.shape, f.dtype, f.device, f.stride()) == (r.shape, r.dtype, r.device, r.stride())


@pytest.mark.parametrize("name", PRIMITIVES)
def test_operator_registration(name):
    torch.library.opcheck(getattr(operators, name), primitives(torch.float32)[name])


@pytest.mark.parametrize("name", PRIMITIVES)
def test_operators_leave_their_inputs_alone(name):
    args = primitives(torch.float32)[name]
    before = [a.clone() if isinstance(a, Tensor) else a for a in args]
    getattr(operators, name)(*args)
    for a, b in zip(args, before, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
