"""``fastsae plan --ranks``: the bytes that real ranks give to each other, and which mode is recommended when."""

import io
import json

import pytest
from models import save_model, token_rows
from plan_worker import CASES, LENGTH, MODES, ROWS, config, main
from ranks import launch_ranks
from rich.console import Console
from test_cli import one_line, run

from fastsae import PlanConfig, RunConfig, SaeConfig, TrainConfig, plan
from fastsae.planning import make, modes
from fastsae.planning.table import show

RUN = RunConfig(device="cpu", ctx_len=LENGTH, max_examples=1000)


def test_bytes_are_those_that_ranks_send(tmp_path, monkeypatch):
    launch_ranks(2, main, tmp_path)
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    save_model("gpt2", tmp_path / "gpt2")
    token_rows(ROWS, LENGTH).save_to_disk(tmp_path / "tokens")
    kept = []
    monkeypatch.setattr(make, "modes", lambda situation, _: kept.append(modes.traffic(situation)) or ())
    for case in CASES:
        for mode in MODES:
            plan(config(case, mode), str(tmp_path / "gpt2"), str(tmp_path / "tokens"), RUN, PlanConfig(ranks=2))
            found = kept.pop()
            planned = found.summed + found.gathered + found.sent + found.between
            measured = max(rank[f"{case} {mode}"] for rank in ranks)
            assert planned == pytest.approx(measured, rel=0.02), f"{case} {mode}"


def test_what_a_ring_sends():
    assert modes.Traffic(800, 10, 7).over_link(4) == 800 * 2 * 3 // 4 + 10 * 3 + 7
    assert modes.Traffic(800, 10, 7, 90).over_link(4, 3) == 800 * 2 * 3 // 4 + 10 * 3 + 7 + 90 * 2 * 2 // 3


def by_options(cfg: TrainConfig, ranks: int, memory: str | None = None):
    return {mode.options: mode for mode in plan(cfg, run=RUN, planned=PlanConfig(memory, ranks)).modes}


def test_the_recommended_mode_fits_and_sends_least(monkeypatch):
    monkeypatch.setattr(make, "process_memory", lambda: 0)
    many = TrainConfig(SaeConfig(num_latents=8192), hookpoints=("h.*", "h.*.mlp"), batch_size=2)
    found = by_options(many, 4)
    assert set(found) == {"", "--distribute-modules", "--distribute-latents 2", "--distribute-latents 4"}
    assert found["--distribute-modules"].recommended  # small batches, large coders, evenly shared
    assert found["--distribute-modules"].load < 1.5
    assert found["--distribute-modules"].peak < found[""].peak / 2
    one = TrainConfig(SaeConfig(num_latents=512), hookpoints=("h.3",), batch_size=64)
    found = by_options(one, 4)
    assert found["--distribute-modules"].load == 4
    assert found[""].recommended  # one coder has one owner; its gradients are less than large batches' activations
    split = found["--distribute-latents 4"]
    found = by_options(one, 4, f"{split.peak}B")
    assert found[""].fits is (found[""].peak <= split.peak)
    assert sum(mode.recommended for mode in found.values()) == 1
    assert next(mode for mode in found.values() if mode.recommended).fits
    assert not any(mode.recommended or mode.fits for mode in by_options(one, 4, "1MiB").values())
    assert by_options(one, 1) == {}


def shown(memory: str) -> str:
    cfg = TrainConfig(layers=(1, 2))
    console = Console(width=120, file=io.StringIO())
    show(plan(cfg, run=RunConfig(device="cpu"), planned=PlanConfig(memory, ranks=2)), console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_table_says_it(capsys):
    out = shown("64GiB")
    assert "on 2 ranks" in out
    assert "replicas" in out
    assert out.count("recommended") == 1
    assert "does not fit" not in out
    out = shown("1MiB")
    assert "recommended" not in out
    assert "does not fit" in out
    code, _, err = run(capsys, "plan", "demo", "--ranks", "2", "--token-buffer", "100", "--device", "cpu")
    assert code == 2
    assert "token_buffer: expected one process" in one_line(err)
