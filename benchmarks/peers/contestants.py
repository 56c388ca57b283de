"""One training step of a TopK autoencoder in fastsae and in what users would pick instead: the real libraries.

Shapes: N tokens of a batch, D width, L latents, K active latents.

All train on the same batches with Adam at the same constant learning rate, float32 weights, the same k and width.
Each keeps its own initialisation, loss and extras: sparsify's FVU, SAELens' and dictionary_learning's squared
error with gradient clipping, as their trainers do it. A contestant's step is what its trainer runs per batch.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Setting(NamedTuple):
    """What all contestants share."""

    N: int
    D: int
    L: int
    k: int
    lr: float
    steps: int
    seed: int
    device: str
    dtype: torch.dtype
    """Of the activations: the precision class. bfloat16 trains float32 weights under autocast or bfloat16 copies."""
    optimizer: str = "adam"
    """adam; for fastsae and sparsify also signum, schedule-free sign descent."""


class Contestant(Protocol):
    """A library at work."""

    def step(self, x: Tensor) -> None:
        """Train on a batch [N, D]."""
        ...

    def reconstruct(self, x: Tensor) -> Tensor:
        """What the coder makes of held-out tokens [n, D]."""
        ...


class Fastsae:
    """fastsae's joint step with its row-wise Adam: what ``fastsae train`` runs at every hookpoint."""

    def __init__(self, s: Setting, *, graph: bool = False):
        from fastsae import FastSae, SaeConfig, TrainConfig, ops
        from fastsae.first_batch import init_biases
        from fastsae.optim import make_optimizer

        torch.manual_seed(s.seed)
        self.coder = FastSae(s.D, SaeConfig(num_latents=s.L, k=s.k), s.device, torch.float32)
        self.cfg = TrainConfig(lr=s.lr, optimizer="signum" if s.optimizer == "signum" else "adam")
        low = s.dtype if s.dtype != torch.float32 else None
        self.optimizer = make_optimizer(self.cfg, [self.coder], low)
        self._init, self._started = init_biases, False
        self._graphed = ops.graphed_step() if graph else None

    def step(self, x: Tensor) -> None:
        from fastsae import loss
        from fastsae.joint import joint_step

        if not self._started:
            self._init(self.coder, x, x)
            self._started = True
        variance = loss.total_variance(x)
        joint_step(
            self.coder, x, x, variance, self.cfg, dead=None, share=1.0, optimizer=self.optimizer, graphed=self._graphed
        )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        if self._graphed is not None and not self._graphed.replays:
            raise RuntimeError("fastsae-graph: expected steps replayed from a CUDA graph, got none; see its log")
        with self.optimizer.evaluation_weights([self.coder]):
            return self.coder(x).sae_out


class Sparsify:
    """eai-sparsify 1.3.3: SparseCoder and the operations of its Trainer's loop, without the model."""

    def __init__(self, s: Setting):
        if s.device == "cpu":
            os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # its CPU path is the eager one
        from sparsify import SparseCoder, SparseCoderConfig

        torch.manual_seed(s.seed)
        self.coder = SparseCoder(s.D, SparseCoderConfig(num_latents=s.L, k=s.k), s.device, torch.float32)
        if s.optimizer == "signum":
            from schedulefree import ScheduleFreeWrapper
            from sparsify.sign_sgd import SignSGD

            self.optimizer = ScheduleFreeWrapper(SignSGD(self.coder.parameters(), lr=s.lr), momentum=0.95)
            self.optimizer.train()
        else:
            self.optimizer = torch.optim.Adam(self.coder.parameters(), lr=s.lr)
        self._averages = s.optimizer == "signum"
        self._started = False

    def step(self, x: Tensor) -> None:
        if not self._started:
            self.coder.b_dec.data = x.mean(0).to(self.coder.b_dec.dtype)
            self._started = True
        self.coder.set_decoder_norm_to_unit_norm()
        self.coder(x, x).fvu.backward()
        self.coder.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        if self._averages:
            self.optimizer.eval()
        out = self.coder(x).sae_out
        if self._averages:
            self.optimizer.train()
        return out


class SaeLens:
    """SAELens 6: its SAETrainer's step on its TopK training class."""

    def __init__(self, s: Setting):
        from sae_lens.config import SAETrainerConfig
        from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
        from sae_lens.training.sae_trainer import SAETrainer

        torch.manual_seed(s.seed)
        self.coder = TopKTrainingSAE(
            TopKTrainingSAEConfig(d_in=s.D, d_sae=s.L, k=s.k, device=s.device, dtype="float32")
        )
        cfg = SAETrainerConfig(
            total_training_samples=s.N * (s.steps + 10), train_batch_size_samples=s.N, lr=s.lr, lr_end=s.lr,
            device=s.device, autocast=s.dtype != torch.float32,
        )  # fmt: skip
        self.trainer = SAETrainer(cfg, self.coder, iter(()))

    def step(self, x: Tensor) -> None:
        self.trainer.step(x.float())
        self.trainer.n_training_steps += 1

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        return self.coder.decode(self.coder.encode(x.float()))


class DictionaryLearning:
    """dictionary_learning 0.1: its TopKTrainer."""

    def __init__(self, s: Setting):
        from dictionary_learning.trainers.top_k import TopKTrainer

        self.trainer = TopKTrainer(
            steps=s.steps + 10, activation_dim=s.D, dict_size=s.L, k=s.k, layer=0, lm_name="none", lr=s.lr,
            warmup_steps=0, seed=s.seed, device=s.device,
        )  # fmt: skip
        self._steps = 0
        self._autocast = s.dtype if s.dtype != torch.float32 else None
        self._device = torch.device(s.device).type

    def step(self, x: Tensor) -> None:
        with torch.autocast(self._device, self._autocast, enabled=self._autocast is not None):
            self.trainer.update(self._steps, x.float())
        self._steps += 1

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        return self.trainer.ae(x.float())


PACKAGES: dict[str, tuple[str, Callable[[Setting], Contestant]]] = {
    "fastsae": ("fastsae", Fastsae),
    "fastsae-graph": ("fastsae", partial(Fastsae, graph=True)),  # --cuda-graph
    "sparsify": ("eai-sparsify", Sparsify),
    "SAELens": ("sae-lens", SaeLens),
    "dictionary_learning": ("dictionary-learning", DictionaryLearning),
}


def make(name: str, setting: Setting) -> Contestant:
    """The contestant ``name``, its library's import warnings unheard."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PACKAGES[name][1](setting)


def names() -> Iterator[str]:
    yield from PACKAGES
