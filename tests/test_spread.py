"""Coders spread over ranks, by hookpoint and by latent, in real processes: beside a single process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from spread_worker import LATENTS, MODULES, TRANSCODER, first_gradients, make_trainer

from fastsae import FastSae
from fastsae.checkpoint import ROWS
from fastsae.distributed.balance import describe, owners

RANKS = 4


def launch(ranks: int, *arguments: str) -> None:
    worker = Path(__file__).with_name("spread_worker.py")
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), str(worker),
            *arguments,
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The runs of all ranks, and under ``one`` the same of this process alone."""
    folder = tmp_path_factory.mktemp("spread")
    launch(RANKS, str(folder))
    return folder


def single(folder: Path, name: str, **changes) -> Path:
    changes.pop("ranks", None)
    run, threads = folder / "one" / name, torch.get_num_threads()
    torch.set_num_threads(1)  # products of more threads sum in another order
    if not run.exists():
        make_trainer(folder / "one", name, **changes).fit(progress=False)
    torch.set_num_threads(threads)
    return run


def coders(run: Path) -> dict[str, dict]:
    return {str(file.parent.relative_to(run)): load_file(file) for file in sorted(run.rglob("sae.safetensors"))}


def records(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("time", "tokens_per_second")} for line in lines]


@pytest.mark.parametrize("name", MODULES)
def test_owners_train_what_a_single_process_trains_to_the_bit(folder, name):
    run, one = folder / f"modules-{name}", single(folder, f"modules-{name}", **MODULES[name])
    assert records(run) == records(one)
    got, want = coders(run), coders(one)
    assert got.keys() == want.keys()
    for coder, tensors in want.items():
        for key, tensor in tensors.items():
            assert tensor.equal(got[coder][key]), (coder, key)
    if name == "signum":
        assert {path.parts[0] for path in map(Path, got)} > {"steps", "best"}


@pytest.mark.parametrize("name", LATENTS)
def test_slices_together_train_what_a_single_process_trains(folder, name):
    run, one = folder / f"latents-{name}", single(folder, f"latents-{name}", **LATENTS[name])
    for got, want in zip(records(run), records(one), strict=True):
        assert got == pytest.approx(want, rel=1e-3, abs=1e-5)
    got, want = coders(run), coders(one)
    assert got.keys() == want.keys()
    for coder, tensors in want.items():
        assert got[coder].keys() == tensors.keys()
        for key, tensor in tensors.items():
            moved = (got[coder][key] - tensor).abs()
            assert moved.mean() < 1e-5, (coder, key, moved.mean())
    FastSae.load_many(run, local=True)  # an ordinary coder: verified on load


def test_gradients_of_replicated_slices_are_those_of_a_single_process(folder):
    want = first_gradients(make_trainer(folder / "one", "transcoder", max_grad_norm=1e9, **TRANSCODER))
    ranks = [torch.load(folder / f"gradients-{rank}.pt") for rank in range(RANKS)]
    scale = max(gradient.abs().max().item() for gradient in want.values())
    for name, gradient in want.items():
        for first in (0, 2):  # both replicas
            parts = [ranks[first][name], ranks[first + 1][name]]
            got = torch.cat(parts) if name in ROWS else parts[1]
            torch.testing.assert_close(got, gradient, rtol=1e-4, atol=1e-5 * scale)
        assert ranks[0][name].equal(ranks[2][name])
        assert ranks[1][name].equal(ranks[3][name])
    assert want["W_dec"].abs().max() > 0


def test_owners_train_at_the_same_time(folder):
    assert len(list(folder.glob("0-*"))) == RANKS  # the worker waits for all of them in every step, or fails
    assert len(coders(folder / "together")) == 4


@pytest.mark.parametrize("mode", ["modules", "latents"])
def test_a_stopped_run_goes_on_to_the_same_bytes(folder, mode):
    whole, stopped = folder / f"whole-{mode}", folder / f"stopped-{mode}"
    assert records(whole) == records(stopped)
    want, got = coders(whole), coders(stopped)
    for coder, tensors in want.items():
        assert all(tensor.equal(got[coder][key]) for key, tensor in tensors.items()), coder
    assert not (stopped / "state").exists()


def test_the_plan_gives_the_heaviest_first_to_who_has_least():
    costs = {"a": 3, "b/k1": 4, "b/k2": 3, "c": 6, "d": 6, "e": 2}
    owner = owners(costs, 3)
    assert owner == {"a": 1, "b/k1": 0, "b/k2": 0, "c": 1, "d": 2, "e": 2}
    assert describe(costs, owner, 4)[3] == "rank 3: 0.0 M parameters (0%): no coder"
    assert describe({"x": 6_000_000, "y": 2_000_000}, {"x": 0, "y": 1}, 2) == [
        "rank 0: 6.0 M parameters (75%): x", "rank 1: 2.0 M parameters (25%): y",
    ]  # fmt: skip


def test_coders_of_one_hookpoint_part_only_where_ranks_would_be_idle():
    assert owners({"a/seed0": 1, "a/seed1": 1, "b": 2}, 2) == {"a/seed0": 0, "a/seed1": 0, "b": 1}
    assert owners({"a/seed0": 1, "a/seed1": 1, "a/seed2": 1}, 2) == {"a/seed0": 0, "a/seed1": 1, "a/seed2": 0}
    assert sorted(owners({"a": 1, "b": 1}, 5).values()) == [0, 1]


def test_no_plan_is_far_from_the_best():
    """Graham's bound, against all plans, for random costs."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        sizes = torch.randint(1, 30, (7,), generator=generator)
        costs = {f"h.{i}": int(size) for i, size in enumerate(sizes)}
        owner = owners(costs, 3)
        loads = [sum(c for name, c in costs.items() if owner[name] == rank) for rank in range(3)]
        plans = torch.cartesian_prod(*[torch.arange(3)] * 7)
        best = torch.stack([((plans == rank) * sizes).sum(1) for rank in range(3)]).amax(0).min().item()
        assert max(loads) <= 4 / 3 * best
