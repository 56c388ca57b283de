"""A coder's step with its latents split over ranks, which are threads here, beside the step of the whole coder."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fastsae_kernels import reference
from fastsae_kernels.auxk import keep_largest
from fastsae_kernels.ranks import best, pack, unpack
from fastsae_kernels.split import keep_largest as keep_largest_of_all
from fastsae_kernels.split import own_winners
from fastsae_kernels.step import coder_step
from fastsae_kernels.step_parts import GradSink
from test_step import VARIANTS, Case, autograd, joint, make_case, to


class ThreadPeers:
    """One rank of several threads, which take turns: Triton's interpreter runs one kernel at a time."""

    def __init__(self, rank: int, bounds: list[int], shared: list, barrier: threading.Barrier, turn: threading.Lock):
        self.rank, self.begin, self.end, self.num_latents = rank, bounds[rank], bounds[rank + 1], bounds[-1]
        self._shared, self._barrier, self._turn = shared, barrier, turn

    def gather(self, part):
        self._shared[self.rank] = part.clone()
        self._wait()
        parts = torch.stack(self._shared)
        self._wait()
        return parts

    def _wait(self):
        self._turn.release()
        try:
            self._barrier.wait()
        finally:
            self._turn.acquire()

    def sum(self, part):
        return self.gather(part).sum(0)


def on_ranks(bounds: list[int], work) -> list:
    """``work(peers)`` of every rank at once, in order."""
    ranks = len(bounds) - 1
    shared, barrier, turn = [None] * ranks, threading.Barrier(ranks, timeout=60), threading.Lock()

    def run(rank):
        try:
            with turn:
                return work(ThreadPeers(rank, bounds, shared, barrier, turn))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(run, range(ranks)))


def split_joint(case: Case, implementation: str, bounds: list[int]) -> dict:
    """What :func:`test_step.joint` returns, put together from the ranks; what all ranks have is checked to be equal."""

    def step(peers):
        own = slice(peers.begin, peers.end)
        coder, loss = case.coder, case.loss
        mine = coder._replace(weight=coder.weight[own], bias=coder.bias[own], W_dec=coder.W_dec[own])
        if loss.dead is not None:
            inside = (loss.dead >= peers.begin) & (loss.dead < peers.end)
            loss = loss._replace(dead=loss.dead[inside] - peers.begin, num_dead=len(loss.dead))
        acc = reference.accumulator_dtype(case.x.dtype)
        sink = GradSink(torch.zeros_like(mine.weight, dtype=acc), torch.zeros_like(mine.W_dec, dtype=acc))
        out = coder_step(
            case.x, case.y, mine, loss, sink,
            k=case.k, activation=case.activation, implementation=implementation, peers=peers,
        )  # fmt: skip
        return out, sink

    outs, sinks = zip(*on_ranks(bounds, step), strict=True)
    same = {"fvu": "fvu", "auxk": "auxk", "multi": "multi_fvu", "b_dec": "d_b_dec", "W_skip": "d_skip"}
    for out in outs[1:]:
        assert all(torch.equal(getattr(out, f), getattr(outs[0], f)) for f in same.values() if f != "d_skip")
    results = {name: getattr(outs[0], field) for name, field in same.items() if getattr(outs[0], field) is not None}
    return results | {
        "weight": torch.cat([sink.dW_enc for sink in sinks]),
        "W_dec": torch.cat([sink.dW_dec for sink in sinks]),
        "bias": torch.cat([out.d_bias for out in outs]),
        "fired": torch.cat([out.fired for out in outs]),
    }


def truth_of(case: Case) -> dict:
    truth = autograd(case)
    indices, shape = truth.pop("indices"), case.coder.bias.shape
    acts = reference.topk_encode(
        case.x, case.coder.weight, case.coder.bias, case.k,
        b_dec=case.coder.b_dec if case.coder.centered else None, activation=case.activation,
    )[0]  # fmt: skip
    return {**truth, "fired": torch.zeros(shape, dtype=torch.bool).index_fill_(0, indices[acts > 0], True)}


CASES = [
    ("reference", (7, 19, 33, 5), [0, 17, 33]),
    ("cpu", (7, 19, 33, 5), [0, 11, 22, 33]),
    ("cpu", (5, 123, 41, 9), [0, 3, 38, 41]),  # ranks with fewer latents than k
    ("cpu", (1, 7, 12, 1), [0, 6, 12]),
]


@pytest.mark.parametrize(
    ("implementation", "shape", "bounds", "variant"),
    [(*case, variant) for case in CASES for variant in VARIANTS] + [("triton", (5, 19, 23, 4), [0, 12, 23], "all")],
    ids=str,
)
def test_ranks_together_make_the_step_of_the_whole_coder(implementation, shape, bounds, variant, device):
    case = make_case(shape, **VARIANTS[variant])
    if implementation == "triton":
        case = to(case, torch.float32, device)
    truth = truth_of(to(case, torch.float64, "cpu"))
    got = split_joint(case, implementation, bounds)
    exact = case.x.dtype == torch.float64
    for name, want in truth.items():
        value = got[name].cpu()
        if name == "fired":
            assert value.equal(want)
        else:
            tolerance = {"rtol": 1e-10, "atol": 1e-12} if exact else {"rtol": 1e-4, "atol": 1e-5}
            torch.testing.assert_close(value.double(), want, **tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
def test_groupmax_needs_no_exchange_of_candidates(implementation):
    case = make_case((9, 12, 25, 5), activation="groupmax")
    got, truth = split_joint(case, implementation, [0, 15, 25]), truth_of(case)
    for name, want in truth.items():
        torch.testing.assert_close(got[name], want, rtol=1e-10, atol=1e-12)
    with pytest.raises((ValueError, threading.BrokenBarrierError), match="whole groups of 5 latents|^$"):
        split_joint(case, implementation, [0, 13, 25])


@pytest.mark.parametrize("implementation", ["reference", "cpu", "triton"])
def test_bfloat16_is_as_near_as_the_whole_coder(implementation, device):
    case = to(make_case((5, 16, 23, 4)), torch.float32, device if implementation == "triton" else "cpu")
    case = case._replace(x=case.x.bfloat16(), y=case.y.bfloat16())
    whole, got = joint(case, implementation), split_joint(case, implementation, [0, 12, 23])
    for name in ("fvu", "weight", "W_dec", "bias", "b_dec"):
        scale = whole[name].float().abs().max().item()
        torch.testing.assert_close(got[name].float(), whole[name].float(), rtol=0, atol=2**-7 * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ties_across_ranks_go_to_the_smaller_latent(dtype):
    """Small integers, so that most activations tie, on a coder whose scores are its input."""
    bounds, N, L, k = [0, 5, 9, 16], 64, 16, 6
    scores = torch.randint(-2, 3, (N, L), generator=torch.Generator().manual_seed(0)).to(dtype)
    scores[0], scores[1, 3], scores[2] = 0, torch.nan, 2
    want_columns = reference.select(scores.relu(), k)
    want_acts = scores.relu().gather(1, want_columns)

    def winners(peers):
        own = scores[:, peers.begin : peers.end].relu()
        columns = reference.select(own, min(k, own.shape[1]))
        acts, columns, first_k = own_winners(own.gather(1, columns), columns, k, 2, peers)
        dense = torch.zeros(N, peers.end - peers.begin + 1, dtype=dtype)
        dense.scatter_(1, torch.where(acts != 0, columns, peers.end - peers.begin), acts)
        head = torch.zeros_like(dense)
        head.scatter_(
            1, torch.where(acts != 0, columns, peers.end - peers.begin)[:, :first_k], acts[:, :first_k]
        )  # fmt: skip
        return dense[:, :-1], head[:, :-1]

    parts = on_ranks(bounds, winners)
    for got, slots in zip((torch.cat(p, 1) for p in zip(*parts, strict=True)), (slice(0, k), slice(0, 2)), strict=True):
        want = torch.zeros(N, L, dtype=dtype).scatter_(1, want_columns[:, slots], want_acts[:, slots])
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_auxk_candidates_of_all_ranks_break_ties_by_latent():
    acts = torch.randint(0, 4, (50, 13), generator=torch.Generator().manual_seed(0)).float()
    for bounds in ([0, 7, 13], [0, 0, 6, 13], [0, 1, 2, 13]):  # a rank without dead latents, and with one
        for k in (1, 4, 12, 13):
            parts = on_ranks(bounds, lambda p, k=k: keep_largest_of_all(acts[:, p.begin : p.end], k, 13, p))
            assert torch.cat(parts, 1).equal(keep_largest(acts, k))


def test_packed_activations_sort_by_the_tie_rule():
    acts = torch.tensor([[1.0, 0.0, 2.0, 1.0, torch.nan, torch.inf, -torch.nan]])
    columns = torch.tensor([[7, 2**31 - 1, 0, 3, 9, 1, 4]])
    values, order = best(acts, columns, 7)
    assert order.tolist() == [[4, 9, 1, 0, 3, 7, 2**31 - 1]]
    assert values.isnan().tolist() == [[True, True, False, False, False, False, False]]
    assert values[0, 2:].tolist() == [torch.inf, 2.0, 1.0, 1.0, 0.0]
    back = unpack(pack(acts, columns))
    assert back[1].equal(columns)
    torch.testing.assert_close(back[0], acts, rtol=0, atol=0, equal_nan=True)


def test_a_rank_decodes_no_more_slots_than_it_won():
    acts = torch.arange(1.0, 17.0).expand(4, 16)

    def width(peers):
        own = acts[:, peers.begin : peers.end].flip(1)
        columns = torch.arange(own.shape[1] - 1, -1, -1).expand(4, -1)
        return own_winners(own[:, :8], columns[:, :8], 8, 0, peers)[0].shape[1]

    assert on_ranks([0, 5, 13, 16], width) == [1, 8, 3]  # of 0, 5 and 3 winners, and 3 latents
