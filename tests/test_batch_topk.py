"""BatchTopK's selection and its threshold against all N·L scores at once, and their gradients against autograd."""

import pytest
import torch
from fastsae_kernels import batch_topk_encode, threshold_encode
from fastsae_kernels.batch_topk import Block, batch_topk, part, rows_of_one_width, slots
from torch import Tensor

IMPLEMENTATIONS = ["reference", "cpu", "triton"]
SHAPES = [(1, 7, 12, 1), (7, 19, 33, 5), (33, 16, 130, 3), (6, 5, 40, 40)]  # N, D, L, K


def integers(shape, *, seed=0):
    """x, weight, bias of small whole numbers: scores are exact in any order of sums, and full of ties."""
    N, D, L, _ = shape
    gen = torch.Generator().manual_seed(seed + N)

    def draw(*size: int) -> Tensor:
        return torch.randint(-2, 3, size, generator=gen).float()

    x = draw(N, D)
    x[N // 2] *= 8  # one token takes far more than its share
    return x, draw(L, D), draw(L)


def dense(acts: Tensor, indices: Tensor, num_latents: int) -> Tensor:
    assert all(len(row.unique()) == len(row) for row in indices)  # any way of spreading them out is right
    assert (acts.diff(dim=1) <= 0).all()  # larger first
    return acts.new_zeros(len(acts), num_latents).scatter(1, indices, acts)


def truth(scores: Tensor, k: int) -> Tensor:  # [N, L]
    """The N·k largest of ReLU'd scores; of equal ones the first by token, then by latent."""
    pre = scores.relu()
    order = sorted(range(pre.numel()), key=lambda i: (-pre.flatten()[i].item(), i))[: len(pre) * k]
    return torch.zeros_like(pre).flatten().scatter(0, torch.tensor(order), pre.flatten()[order]).view_as(pre)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("implementation", "shape"),
    [(name, shape) for name in IMPLEMENTATIONS for shape in (SHAPES if name != "triton" else SHAPES[1:2])],
    ids=str,
)
def test_the_largest_of_the_batch_and_all_above_a_threshold(implementation, shape, device):
    x, weight, bias = integers(shape)
    L, k, scores = shape[2], shape[3], x @ weight.T + bias
    place = device if implementation == "triton" else "cpu"
    moved = [t.to(place) for t in (x, weight, bias)]
    acts, indices, _ = batch_topk_encode(*moved, k, implementation=implementation)
    want = truth(scores, k)
    assert torch.equal(dense(acts.cpu(), indices.cpu(), L), want)
    assert acts.shape[1] == slots(int((want > 0).sum(1).max()), k, L)
    # 3.0 is the value of some scores, which are not above it
    for threshold in (0.0, 3.0, 1e6) if implementation != "triton" else (3.0,):
        acts, indices, _ = threshold_encode(
            *moved, torch.tensor(threshold, device=place), k, implementation=implementation
        )
        want = scores.relu() * (scores > threshold)
        assert torch.equal(dense(acts.cpu(), indices.cpu(), L), want)
        assert acts.shape[1] == slots(int((want > 0).sum(1).max()), k, L)


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
@pytest.mark.parametrize("by_threshold", [False, True])
def test_gradients_against_autograd_of_all_scores(implementation, by_threshold):
    gen = torch.Generator().manual_seed(3)
    x, weight, bias, b_dec = (
        torch.randn(size, generator=gen, dtype=torch.float64).requires_grad_()
        for size in ((9, 7), (31, 7), (31,), (7,))
    )
    pre = ((x - b_dec) @ weight.T + bias).relu()
    cut = 2.5 if by_threshold else pre.detach().flatten().sort(descending=True).values[9 * 2 - 1]
    want = torch.where(pre > cut if by_threshold else pre >= cut, pre, 0.0)
    if by_threshold:
        out = threshold_encode(x, weight, bias, torch.tensor(cut), 2, b_dec=b_dec, implementation=implementation)
    else:
        out = batch_topk_encode(x, weight, bias, 2, b_dec=b_dec, implementation=implementation)
    got = out.top_acts.new_zeros(9, 31).scatter(1, out.top_indices, out.top_acts)
    torch.testing.assert_close(got, want)
    probe = torch.randn(9, 31, generator=gen, dtype=torch.float64)
    inputs = [x, weight, bias, b_dec]
    for mine, true in zip(
        torch.autograd.grad((got * probe).sum(), inputs),
        torch.autograd.grad((want * probe).sum(), inputs), strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(mine, true)


def test_only_tokens_that_may_hide_more_are_encoded_again():
    """100 tokens with one strong latent each, and one token with 60 of them: it alone is widened."""
    scores = torch.zeros(101, 64)
    scores[torch.arange(100), torch.arange(100) % 64] = 1.0
    scores[100, :60] = torch.arange(60, 0, -1.0) + 1
    seen = []

    def encode(rows: Tensor, width: int) -> tuple[Tensor, Tensor]:
        seen.append((len(rows), width))
        values, indices = rows.sort(dim=1, descending=True, stable=True)
        return values[:, :width], indices[:, :width]

    blocks = batch_topk(scores, 1, 64, encode)
    assert seen == [(101, 2), (1, 4), (1, 8), (1, 16), (1, 32), (1, 64)]
    assert [tuple(block.acts.shape) for block in blocks] == [(100, 2), (1, 64)]
    assert sum(int((block.acts > 0).sum()) for block in blocks) == 101
    rows, acts, indices = rows_of_one_width(blocks)
    assert rows is not None
    spread = torch.zeros_like(scores).index_put_((rows[:, None], indices), acts, accumulate=True)
    assert torch.equal(spread, truth(scores, 1))
    for begin, end in ((0, 40), (40, 101)):
        rows, acts, indices = rows_of_one_width(part(blocks, begin, end))
        assert rows is not None
        spread = torch.zeros(end - begin, 64).index_put_((rows[:, None], indices), acts, accumulate=True)
        assert torch.equal(spread, truth(scores, 1)[begin:end])


def test_nan_reaches_the_activations_and_an_empty_batch_is_fine():
    x, weight, bias = integers((7, 19, 33, 5))
    x[2] = torch.nan
    for implementation in ("reference", "cpu"):
        assert batch_topk_encode(x, weight, bias, 5, implementation=implementation).top_acts[2].isnan().any()
        empty = batch_topk_encode(x[:0], weight, bias, 5, implementation=implementation)
        assert empty.top_acts.shape == (0, 10)
    blocks = [Block(None, torch.zeros(0, 4), torch.zeros(0, 4, dtype=torch.int64))]
    assert rows_of_one_width(blocks) is blocks[0]


def threshold_encode_at_1(x, weight, bias, k, **options):
    return threshold_encode(x, weight, bias, torch.ones(()), k, **options)


@pytest.mark.parametrize("encode", [batch_topk_encode, threshold_encode_at_1])
def test_what_does_not_fit_is_refused(encode):
    x, weight, bias = integers((7, 19, 33, 5))
    with pytest.raises(ValueError, match=r"expected x \[N, D\], weight \[L, D\], .* got \[7, 19\], \[33, 18\]"):
        encode(x, weight[:, 1:], bias, 5, implementation="cpu")
    with pytest.raises(ValueError, match=r"expected b_dec \[19\], got \[3\]"):
        encode(x, weight, bias, 5, b_dec=torch.zeros(3), implementation="cpu")
    with pytest.raises(ValueError, match=r"expected 1 <= k <= number of latents \(33\), got k = 34"):
        encode(x, weight, bias, 34, implementation="cpu")
