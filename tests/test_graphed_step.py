"""A step as a CUDA graph: the same bits as step by step, replayed where only its inputs' numbers change."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fastsae_kernels import graphed_step
from fastsae_kernels.graphed_step import EAGER_STEPS, GraphedStep
from fastsae_kernels.row_update import scalars
from fastsae_kernels.rules import Adam, Adam8bit, Rows, Rule, Signum
from fastsae_kernels.step import Loss, coder_step
from fastsae_kernels.step_parts import Coder, RowStep
from models import make_model, token_rows

from fastsae import SaeConfig, TrainConfig, Trainer
from fastsae.errors import ConfigError

N, D, L, K = 9, 24, 70, 3
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def sparse_backward(monkeypatch):
    """The one with the optimizer in it: so few latents would take dense products on a GPU, which no graph holds."""
    monkeypatch.setenv("FASTSAE_BACKWARD", "sparse")


class Training:
    """A coder whose matrices are trained step by step, on other tokens and at another rate each time."""

    def __init__(self, rule: Rule, device: str, dtype: torch.dtype, *, skip: bool = False):
        gen = torch.Generator().manual_seed(1)

        def draw(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=gen).to(device)

        W_dec = torch.nn.functional.normalize(draw(L, D), dim=1)
        self.coder = Coder(
            draw(L, D) / 5, draw(L) / 9, W_dec, draw(D), draw(D, D) / D if skip else None, not skip
        )  # fmt: skip
        if dtype != torch.float32:
            self.coder = self.coder._replace(low_weight=self.coder.weight.to(dtype), low_W_dec=W_dec.to(dtype))
        self.rows = [
            Rows(self.coder.weight, rule.new_state(self.coder.weight), False, self.coder.low_weight),
            Rows(self.coder.W_dec, rule.new_state(W_dec), not skip, self.coder.low_W_dec),
        ]
        self.rule, self.device, self.dtype, self.skip, self.steps = rule, device, dtype, skip, 0

    def step(self, run=coder_step, tokens: int = N, on_device: bool = False, **loss) -> dict[str, torch.Tensor]:
        self.steps += 1
        gen = torch.Generator().manual_seed(self.steps)
        x, y = (torch.randn(tokens, D, generator=gen).to(self.device, self.dtype) for _ in range(2))
        y = y if self.skip else x
        sink = RowStep(self.rule, 0.01 / self.steps, self.steps, *self.rows)
        if on_device:
            numbers = torch.tensor(scalars(self.rule, sink.lr, sink.step), device=self.device)
            sink = replace(sink, lr=float("nan"), step=10**6, scalars=numbers)
        variance = (y.float() - y.float().mean(0)).square().sum()
        out = run(x, y, self.coder, Loss(variance, **loss), sink, k=K, implementation="triton")
        tensors = {name: t.clone() for name, t in out._asdict().items() if isinstance(t, torch.Tensor)}
        state = {f"state {i} {name}": t for i, rows in enumerate(self.rows) for name, t in rows.state.items()}
        kept = {name: t for name, t in self.coder._asdict().items() if isinstance(t, torch.Tensor)}
        return {**tensors, **{name: t.clone() for name, t in (state | kept).items()}}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("rule", [Adam(), Adam8bit(), Signum()], ids=lambda rule: rule.name)
def test_the_rules_numbers_may_lie_on_the_device(rule, device):
    usual, other = (Training(rule, device, torch.float32) for _ in range(2))
    one, two = usual.step(), other.step(on_device=True)
    if device == "cuda":
        assert_same(one, two)
    for name in one:  # the interpreter keeps the numbers that it is given in float64
        torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"loss": {"dead": torch.tensor([3, 8]), "k_aux": 2, "alpha": 0.1}}, "dead latents to revive"),
        ({"loss": {"prefixes": (30, L)}}, "BatchTopK's or prefixes' selections"),
        ({"backward": "dense"}, f"{L} latents for {K} active ones, whose backward is dense products"),
        ({"dtype": torch.float32, "device": "cpu"}, "implementation triton on cpu"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_not_recorded_is_said_once(change, says, device, monkeypatch, caplog):
    if "device" in change and device != "cpu":
        pytest.skip("of a machine without a GPU")
    monkeypatch.setattr(graphed_step, "_said", set())
    monkeypatch.setenv("FASTSAE_BACKWARD", change.get("backward", "sparse"))
    caplog.set_level("INFO", "fastsae")
    loss = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in change.get("loss", {}).items()}
    graphed = GraphedStep()
    usual, other = (Training(Adam(), device, torch.float32) for _ in range(2))
    for _ in range(2):
        assert_same(
            *(t.step(run, change.get("tokens", N), **loss) for t, run in ((usual, coder_step), (other, graphed)))
        )
    assert caplog.text.count(f"no CUDA graph of a step with {says}: going on kernel by kernel") == 1


def test_without_a_gpu_it_is_the_step(device):
    graphed = GraphedStep()
    usual, other = (Training(Adam(), device, torch.float32) for _ in range(2))
    for _ in range(EAGER_STEPS):
        assert_same(usual.step(), other.step(graphed))
    assert graphed.replays == 0


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", [Adam(), Adam8bit(), Signum()], ids=lambda rule: rule.name)
@pytest.mark.parametrize("skip", [False, True], ids=["autoencoder", "transcoder"])
def test_a_replay_is_the_step_to_the_bit(rule, dtype, skip):
    graphed = GraphedStep()
    usual, other = (Training(rule, "cuda", dtype, skip=skip) for _ in range(2))
    for _ in range(EAGER_STEPS + 4):
        assert_same(usual.step(), other.step(graphed))
    assert graphed.replays == 4


@gpu
def test_coders_that_take_turns_are_replayed_each_on_its_own():
    graphs = [GraphedStep(), GraphedStep()]
    pairs = [[Training(Adam(), "cuda", torch.bfloat16, skip=skip) for _ in range(2)] for skip in (False, True)]
    for _ in range(EAGER_STEPS + 3):
        for graphed, (usual, other) in zip(graphs, pairs, strict=True):
            assert_same(usual.step(), other.step(graphed))
    del graphs[0]  # its memory goes with it, and none of the other's
    for _ in range(2):
        assert_same(pairs[1][0].step(), pairs[1][1].step(graphs[0]))
    assert graphs[0].replays == 5


@gpu
def test_other_shapes_and_losses_are_recorded_anew_or_not_at_all():
    graphed = GraphedStep()
    usual, other = (Training(Adam(), "cuda", torch.bfloat16) for _ in range(2))
    dead = {"dead": torch.tensor([3, 8], device="cuda"), "k_aux": 2, "alpha": 0.1}
    again = EAGER_STEPS + 1
    for change, count, replays in (({}, 4, 2), (dead, 4, 2), ({"tokens": 5}, again, 3), ({"multi_k": 9}, again, 4)):
        for _ in range(count):
            assert_same(usual.step(**change), other.step(graphed, **change))
        assert graphed.replays == replays


@gpu
def test_where_memory_is_short_it_goes_on_step_by_step(monkeypatch, caplog):
    def refuse(*_args, **_options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("fastsae_kernels.graphed_step._Recorded", refuse)
    graphed = GraphedStep()
    usual, other = (Training(Adam(), "cuda", torch.float32) for _ in range(2))
    for _ in range(5):
        assert_same(usual.step(), other.step(graphed))
    assert caplog.text.count("no CUDA graph could be recorded") == 1


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimizer", ["adam", "signum"])
def test_a_run_with_graphs_ends_in_the_same_weights(optimizer, dtype, tmp_path):
    weights = []
    for graph in (False, True):
        cfg = TrainConfig(
            SaeConfig(num_latents=64, k=4), hookpoints=("h.0", "h.1.mlp"), batch_size=4, save_dir=str(tmp_path),
            optimizer=optimizer, run_name=f"{graph}", cuda_graph=graph, k_decay_steps=5,
        )  # fmt: skip
        trainer = Trainer(cfg, token_rows(130, 8), make_model("gpt2").to("cuda", dtype))
        trainer.fit(progress=False)
        weights.append([p.detach().cpu() for coder in trainer.coders.values() for p in coder.parameters()])
        if graph:
            assert all(step.replays > 10 for step in trainer.micro_batches._graphed.values())
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


def test_a_run_without_a_gpu_refuses(tmp_path):
    cfg = TrainConfig(SaeConfig(num_latents=64, k=4), cuda_graph=True, save_dir=str(tmp_path))
    with pytest.raises(ConfigError, match="cuda_graph: expected a GPU, got cpu"):
        Trainer(cfg, token_rows(8, 8), make_model("gpt2"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"grad_acc_steps": 2}, "grad_acc_steps 1 with it, got 2"),
        ({"max_grad_norm": 1.0}, "max_grad_norm None with it, got 1.0"),
        ({"optimizer": "muon"}, "adam, adam8bit or signum with it, got muon"),
        ({"sae": SaeConfig(activation="batchtopk")}, "topk or groupmax"),
    ],
)
def test_what_no_graph_can_hold_is_refused(options, says):
    with pytest.raises(ConfigError, match=f"cuda_graph: expected {says}"):
        TrainConfig(cuda_graph=True, **options)
