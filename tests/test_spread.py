"""Coders spread over ranks, by hookpoint and by latent, in real processes: beside a single process."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ranks import launch_ranks
from safetensors.torch import load_file
from spread_worker import LATENTS, MODULES, TRANSCODER, first_gradients, main, make_trainer
from torch.optim.lr_scheduler import LambdaLR

from fastsae import FastSae, SaeConfig, TrainConfig
from fastsae.checkpoint import ROWS
from fastsae.distributed.balance import describe, owners
from fastsae.distributed.latent_peers import latent_bounds
from fastsae.distributed.latent_slice import LatentSlice
from fastsae.errors import ConfigError
from fastsae.metrics import TrainingMetrics
from fastsae.optim import make_optimizer
from fastsae.trainer_state import load_into, state_of

RANKS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The runs of all ranks, and under ``one`` the same of this process alone."""
    folder = tmp_path_factory.mktemp("spread")
    launch_ranks(RANKS, main, folder)
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


@pytest.mark.parametrize("mode", ["modules", "latents"])
def test_one_process_goes_on_with_what_four_had_saved(folder, mode):
    """Of the parts that four processes wrote, one makes whole coders, moments and counters."""
    run = folder / f"copied-{mode}"
    trainer = make_trainer(folder, f"copied-{mode}", optimizer="adam8bit")
    with pytest.raises(ConfigError, match="batches of 12 sequences .*4 times 3.*got 1 times 6; give --batch-size 12"):
        make_trainer(folder, f"copied-{mode}", batch=6, optimizer="adam8bit").resume(run)
    trainer.resume(run)
    assert trainer.step == 2
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    trainer.fit(progress=False)
    torch.set_num_threads(threads)
    for got, want in zip(records(run), records(folder / f"whole-{mode}"), strict=True):
        assert got == (want if mode == "modules" else pytest.approx(want, rel=1e-3, abs=1e-5))
    want, got = coders(folder / f"whole-{mode}"), coders(run)
    for coder, tensors in want.items():
        for key, tensor in tensors.items():
            if mode == "modules":
                assert tensor.equal(got[coder][key]), (coder, key)
            else:
                assert (got[coder][key] - tensor).abs().mean() < 1e-5, (coder, key)


def make_slices(bounds: list[int], cfg: SaeConfig, seed: int = 0) -> list[LatentSlice]:
    """A coder's slices, made without other processes."""
    slices = []
    for rank, (begin, end) in enumerate(itertools.pairwise(bounds)):
        torch.manual_seed(seed)
        peers = SimpleNamespace(
            rank=rank, begin=begin, end=end, num_latents=bounds[-1], bounds=bounds, sum=lambda part: part
        )
        slices.append(LatentSlice(6, cfg, peers=peers))  # type: ignore[arg-type]
    return slices


def test_slices_start_as_the_rows_of_the_whole_coder(monkeypatch):
    monkeypatch.setattr("fastsae.distributed.latent_slice.INIT_ROWS", 24)  # four rows at a time
    cfg = SaeConfig(num_latents=23, k=3)
    bounds = latent_bounds(cfg, 6, 3)
    assert bounds == [0, 7, 15, 23]
    torch.manual_seed(0)
    whole = FastSae(6, cfg, dtype=torch.float32).state_dict()
    parts = [part.state_dict() for part in make_slices(bounds, cfg)]
    for name, tensor in whole.items():
        got = torch.cat([part[name] for part in parts]) if name in ROWS else parts[0][name]
        assert got.equal(tensor), name
    assert latent_bounds(SaeConfig(num_latents=20, k=5, activation="groupmax"), 6, 3) == [0, 4, 12, 20]
    with pytest.raises(ConfigError, match=r"latents for each of 24 ranks, got 23; lower --distribute-latents"):
        latent_bounds(cfg, 6, 24)


@pytest.mark.parametrize("name", ["adam", "adam8bit", "signum"])
def test_a_state_is_sliced_anew_for_another_number_of_ranks(name):
    """Weights, moments, counters: two slices' state into three, and those into one whole coder."""
    cfg = SaeConfig(num_latents=23, k=3)

    def trained(slices: list, filled: bool) -> list:
        made = []
        for coder in slices:
            optimizer = make_optimizer(TrainConfig(cfg, optimizer=name, lr=0.01), [coder])
            for parameter in coder.parameters() if filled else ():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
            schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))
            metrics = TrainingMetrics("h", coder)
            metrics.tokens_since_fired.random_(100)
            made.append(({"h": coder}, {"h": metrics}, optimizer, schedule))
        return made

    saved = [state_of(*one) for one in trained(make_slices([0, 9, 23], cfg), filled=True)]
    three = trained(make_slices([0, 7, 15, 23], cfg, seed=1), filled=False)
    for one in three:
        load_into(*one, saved, 10)
    whole = trained([FastSae(6, cfg, dtype=torch.float32)], filled=False)
    load_into(*whole[0], [state_of(*one) for one in three], 10)
    got = state_of(*whole[0])["coders"]["h"]
    parts = [state["coders"]["h"] for state in saved]

    def same(got, parts, row: bool):
        assert got.equal(torch.cat(parts) if row else parts[0])

    for key, tensor in got["weights"].items():
        same(tensor, [part["weights"][key] for part in parts], key in ROWS)
        for moment, values in got["optimizer"][key].items():
            row = key in ROWS and moment != "step"
            same(values, [part["optimizer"][key][moment] for part in parts], row)
    same(got["metrics"]["tokens_since_fired"], [part["metrics"]["tokens_since_fired"] for part in parts], True)


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
