"""What a plan advises: its numbers again from a plan of just that run; and speed, from records by hand."""

import json
import shlex
from dataclasses import fields

import pytest
from test_cli import one_line, run

from fastsae import PlanConfig, RunConfig, SaeConfig, TrainConfig, plan
from fastsae.bench.shapes import OPS, Shape
from fastsae.planning import make

RUN = RunConfig(device="cpu", ctx_len=256, max_tokens=100_000)
CFG = TrainConfig(SaeConfig(k=32), hookpoints=("h.*.mlp.act",), batch_size=16)


def planned(cfg=CFG, memory=None, **options):
    return plan(cfg, run=RUN, planned=PlanConfig(memory=None if memory is None else f"{memory}B", **options))


@pytest.fixture(autouse=True)
def _bare_process(monkeypatch):
    monkeypatch.setattr(make, "process_memory", lambda: 0)


def with_options(text: str) -> tuple[TrainConfig, dict[str, int]]:
    """CFG with options as they stand in an advice, and ``--ranks``."""
    values: dict[str, object] = {}
    words = shlex.split(text)
    for i, word in enumerate(words):
        if word.startswith("--"):
            value = words[i + 1] if i + 1 < len(words) and not words[i + 1].startswith("--") else True
            values[word[2:].replace("-", "_")] = int(value) if str(value).isdecimal() else value
    ranks = values.pop("ranks", 1)
    return TrainConfig(**{**{f.name: getattr(CFG, f.name) for f in fields(CFG)}, **values}), {"ranks": ranks}  # type: ignore


def test_the_micro_batch_chosen_is_the_largest_that_fits():
    """Few latents and many tokens: what a step makes for itself decides."""
    cfg = TrainConfig(SaeConfig(num_latents=256, k=64, multi_topk=True), hookpoints=("h.0",), batch_size=32, held_out=0)
    whole = planned(cfg).memory.peak
    halves = planned(TrainConfig(**{**vars(cfg), "micro_acc_steps": 2})).memory.peak
    assert halves < 0.9 * whole
    advice = planned(cfg, memory=halves).advice
    assert (advice.micro_acc_steps, advice.micro_batch) == (2, 32 * 256 // 2)
    assert planned(cfg, memory=whole).advice.micro_acc_steps == 1
    assert planned(cfg, memory=whole - 1).advice.micro_acc_steps == 2


def test_changes_fit_and_are_what_a_plan_of_them_says():
    whole = planned().memory
    made = planned(memory=int(0.6 * whole.peak))
    assert made.memory.fits is False
    assert made.advice.micro_acc_steps is None
    found = {change.what: change.peak for change in made.advice.changes}
    assert any("adam8bit" in what for what in found)
    assert any("--distribute-modules" in what for what in found)
    assert any("--distribute-latents 2" in what for what in found)
    for what, peak in found.items():
        assert peak <= made.memory.available
        if what.startswith("--"):
            cfg, options = with_options(what)
            assert planned(cfg, **options).memory.peak == peak, what
        else:
            count = int(what.split()[0])
            assert planned(TrainConfig(**{**vars(CFG), "hookpoints": tuple(
                f"h.{i}.mlp.act" for i in range(count))})).memory.peak == pytest.approx(peak, rel=0.02)  # fmt: skip


def record(device: str, shapes, ms: float) -> dict:
    cases = [
        {"op": "fwd+bwd", "implementation": "cpu", "ms": ms, "shape": shape._asdict()} for shape in shapes
    ]  # fmt: skip
    return {"cases": cases, "peaks": {"gemm_flops": 1e11, "copy_bytes": 1e10}, "device": {"name": device}}


def test_speed_from_a_record(tmp_path):
    here, other = Shape("here", 4096, 512, 16384, 32), Shape("other", 2048, 512, 16384, 32)
    (tmp_path / "bench.json").write_text(json.dumps(record("some CPU", [here], 500.0)))
    made = planned(bench=str(tmp_path / "bench.json"))
    kept = made.memory.kept
    model = 16 * made_flops(made) / 1e11
    seconds = model + 6 * 0.5 + 2 * (kept.weights + kept.optimizer) / 1e10
    assert made.speed is not None
    assert made.speed.tokens_per_second == pytest.approx(4096 / seconds, rel=1e-6)
    assert "some CPU" in made.speed.source
    assert made.seconds == pytest.approx(made.tokens.total / made.speed.tokens_per_second)
    (tmp_path / "bench.json").write_text(json.dumps(record("some CPU", [other], 500.0)))
    bounds = [OPS["fwd+bwd"].cost(shape, 4).bound_ms(1e11, 1e10) for shape in (here, other)]
    seconds += 6 * 0.5 * (bounds[0] / bounds[1] - 1)
    made = planned(bench=str(tmp_path / "bench.json"))
    assert made.speed is not None
    assert made.speed.tokens_per_second == pytest.approx(4096 / seconds, rel=1e-6)


def made_flops(made) -> int:
    """Of the demo's forward, up to the last MLP's activation function: 2 per weight and token, and attention's two."""
    D, S = 128, 256
    layer = 2 * S * (3 * D * D + D * D + 4 * D * D) + 4 * S * S * D
    return 6 * layer + 5 * 2 * S * 4 * D * D


def test_records_that_tell_nothing_are_refused(tmp_path, capsys):
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(record("some CPU", [Shape("S1", 8192, 4096, 131072, 64)], 1.0)))
    options = ("--hookpoints", "h.0", "--device", "cpu", "--bench", str(path))
    code, _, err = run(capsys, "plan", "demo", *options)
    assert code == 2
    assert "fastsae bench --shapes 2048,128,4096,32 --json" in one_line(err)
    path.write_text("{}")
    code, _, err = run(capsys, "plan", "demo", *options)
    assert code == 2
    assert "expected a file that fastsae bench --json FILE wrote" in one_line(err)


def test_measured_speed(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ("--layers", "1", "--num-latents", "256", "--device", "cpu", "--batch-size", "2", "--json")
    code, out, _ = run(capsys, "plan", "demo", *options, "--measure")
    assert code == 0
    values = json.loads(out)
    assert values["speed"]["tokens_per_second"] > 0
    assert values["seconds"] == pytest.approx(values["tokens"]["total"] / values["speed"]["tokens_per_second"])
    assert not list(tmp_path.iterdir())
    code, _, err = run(capsys, "plan", "demo", *options, "--measure", "--ranks", "2")
    assert code == 2
    assert "measure: expected one process, got --ranks 2" in one_line(err)
