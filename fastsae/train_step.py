"""What one optimizer step of a run needs and does: model, data, coders, optimizer, and the sums behind its numbers.

Shapes: B sequences, S tokens each, N tokens after masking, D width. "step" is an optimizer step, "batch" a
batch of sequences. A coder's forward and backward run inside the model's forward, as its activations
appear: only one hookpoint's activations are alive at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .activations import ActivationSource, ModelPass, Use
from .batches import prefetched
from .coders import coder_specs, find_hookpoints, make_coders
from .config import TrainConfig
from .distributed.joining import current
from .distributed.shared_model import check_same_rows
from .distributed.strategies import make_strategy
from .distributed.world import World
from .end_to_end import EndToEnd
from .errors import ArtifactError, ConfigError
from .first_batch import FirstBatches
from .held_out import held_out_metrics
from .metrics import TrainingMetrics
from .micro_batches import MicroBatches
from .optim import active_latents, apply_gradients, learning_rates, make_optimizer, make_schedule
from .placement import check_one_process, is_spread
from .pretrained import load_pretrained
from .row_optimizer import RowOptimizer
from .rows import Batches, split_held_out
from .sae import FastSae
from .token_shuffle import TokenShuffles
from .trainer_state import check_same_coders, load_into, state_of


class StepTrainer:
    """Takes optimizer steps, measures, and can be stored between any two of them; :class:`Trainer` makes runs of it."""

    def __init__(
        self, cfg: TrainConfig, dataset: Any, model: PreTrainedModel | ActivationSource, *,
        origin: dict[str, Any] | None = None, world: World | None = None,
    ):  # fmt: skip
        self.cfg, self.model, self.origin = cfg, model, origin or {}
        self.world = current() if world is None else world
        if is_spread(model):
            check_one_process(self.world.size)
        rows, self.held_out_rows = split_held_out(dataset, cfg.held_out)
        self._held_out_start = self.held_out_rows.state_dict()
        self.source = model if isinstance(model, ActivationSource) else _model_pass(model, cfg)
        self._readers = World() if self.source.shared else self.world  # of a shared model each rank reads all
        device = self.source.device
        if cfg.cuda_graph and device.type != "cuda":
            raise ConfigError(f"cuda_graph: expected a GPU, got {device}; leave it out")
        pin, together = device.type == "cuda", cfg.batch_size * self._readers.size
        self._batches = Batches(rows, together, pin=pin, part=self._readers.part)
        self._cursor: Callable[[], dict[str, Any]] = rows.snapshot()  # after the batches trained on
        self.total_steps = -(-len(self._batches) // cfg.grad_acc_steps)
        if self.total_steps == 0:
            raise ArtifactError("dataset: expected at least one sequence to train on, got none")

        self.hookpoints = self.source.hookpoints
        self.specs = coder_specs(cfg, self.hookpoints)
        self._strategy = make_strategy(cfg, self.world, self.specs, device, shared=self.source.shared)
        own = {name: spec for name, spec in self.specs.items() if self._strategy.owns(name)}
        self.coders = make_coders(own, device, lambda spec: self._strategy.make(spec, cfg.implementation))
        finetuned = {} if cfg.finetune is None else load_pretrained(self.coders, cfg.finetune, self._model_name())
        self.first_batches = FirstBatches(finetuned, self._strategy.mean_of)
        self.metrics = {name: TrainingMetrics(name, coder) for name, coder in self.coders.items()}
        self.end_to_end = None
        if cfg.loss_fn != "fvu" and self.source.shared:
            raise ConfigError(f"loss_fn: expected fvu with --tp-plan, got {cfg.loss_fn}, of a model in one piece")
        if cfg.loss_fn != "fvu":
            if not isinstance(self.source, ModelPass):
                raise ConfigError(
                    f"loss_fn: expected fvu on cached activations, got {cfg.loss_fn}, of a model that runs"
                )
            self.end_to_end = EndToEnd(cfg, self.source, self.coders, self.metrics, self._strategy)
        low_dtype = self.source.dtype if device.type == "cuda" and self.source.dtype != torch.float32 else None
        self.optimizer = make_optimizer(cfg, self.coders.values(), low_dtype)
        self.schedule = make_schedule(cfg, self.optimizer, self.total_steps)
        self.micro_batches = MicroBatches(cfg.micro_acc_steps, graphs=cfg.cuda_graph)
        self._shuffles = TokenShuffles(cfg.token_buffer, device)
        self.step = 0
        self.tokens = 0
        self._seconds, self._start = 0.0, time.perf_counter()  # spent before this process, and its start

    def train_step(self, batches: list[dict[str, Tensor]], counts: list[int] | None = None) -> None:
        """One optimizer step on the summed gradients of ``batches`` (each with ``input_ids [B, S]``).

        Of each batch the other ranks have other parts; ``counts`` are :meth:`count_tokens`'.
        """
        counts = self.count_tokens(batches)[0] if counts is None else counts
        share, tokens = 1 / len(batches), sum(counts)

        def train(hookpoint: str, x: Tensor, y: Tensor) -> None:
            self._train_hookpoint(hookpoint, x, y, share)

        for rows, count in zip(batches, counts, strict=True):
            if count and self.end_to_end is None:
                self._run(rows, train, at=f"step {self.step + 1}")
            elif count and self.end_to_end is not None:
                if self.hookpoints.keys() - self.first_batches.sizes.keys():
                    self._run(rows, self._meet, at=f"step {self.step + 1}")  # as the model is, without coders in it
                self.end_to_end.train(rows, share, self.step)
        self._strategy.reduce(self.coders, self.metrics)
        for metrics in self.metrics.values():
            metrics.watch(self.step + 1)
        self._lr = max(learning_rates(self.optimizer))
        apply_gradients(self.optimizer, self.coders.values(), self.cfg.max_grad_norm)
        self.schedule.step()
        auxk = self.cfg.auxk_alpha > 0 and self.tokens + tokens > self.cfg.dead_feature_threshold
        for metrics in self.metrics.values():
            metrics.end_step(tokens, self.cfg.dead_feature_threshold if auxk else None)
        self.step += 1
        self.tokens += tokens

    def _run(self, rows: dict[str, Tensor], use: Use, *, at: str) -> None:
        """The model on this rank's part of a batch; ``use`` gets the activations where their coders are."""

        def deliver(hookpoint: str, x: Tensor, y: Tensor) -> None:
            self._strategy.deliver(hookpoint, x, y, use)

        self.source.run(rows, deliver, at=at, empty=self._readers.size > 1)
        self._strategy.end_batch(use)

    def count_tokens(self, batches: list[dict[str, Tensor]], signal: int = 0) -> tuple[list[int], int]:
        """(tokens of each batch over all ranks, the highest ``signal`` that any rank received)."""
        if self.source.shared:
            check_same_rows(self.world, batches)
        return self._strategy.tokens([self.source.count(rows) for rows in batches], signal)

    def _train_hookpoint(self, hookpoint: str, x: Tensor, y: Tensor, share: float) -> None:
        self._meet(hookpoint, x, y)
        x, y = self._shuffles.exchange(hookpoint, x, y)
        variance, count = self._strategy.variance(y)
        for name, coder in self._coders_at(hookpoint).items():
            optimizer = self.optimizer if isinstance(self.optimizer, RowOptimizer) else None
            with self.metrics[name].stopwatch:
                self.micro_batches.train(
                    coder, x, y, self.metrics[name], self.cfg, variance=variance, count=count, share=share,
                    optimizer=optimizer, inside=self._in_place(), k=active_latents(self.cfg, coder, self.step),
                    step=self.step,
                )  # fmt: skip
            self.metrics[name].watch(self.step + 1, variance)

    def _meet(self, hookpoint: str, x: Tensor, y: Tensor) -> None:
        self.first_batches.meet(hookpoint, x, y, self._coders_at(hookpoint))

    def _coders_at(self, hookpoint: str) -> dict[str, FastSae]:
        return {name: coder for name, coder in self.coders.items() if name.partition("/")[0] == hookpoint}

    def _in_place(self) -> bool:
        """Whether matrices can take their step inside the backward pass: nothing else needs their gradients."""
        once = self._strategy.fuses and all(hookpoint.calls == 1 for hookpoint in self.hookpoints.values())
        return once and self.cfg.grad_acc_steps == self.micro_batches.parts == 1 and self.cfg.max_grad_norm is None

    def read_metrics(self) -> dict[str, float]:
        """Means since the last reading; raises :class:`NonFiniteError` where training broke down."""
        values: dict[str, float] = {}
        threshold = self.cfg.dead_feature_threshold
        per_coder = self._strategy.gather({name: metrics.read(threshold) for name, metrics in self.metrics.items()})
        rates = self._strategy.gather({str(self.world.rank): self._lr})
        values["fvu"] = sum(v["fvu"] for v in per_coder.values()) / len(per_coder)
        if self.end_to_end is not None:
            values["loss"] = self.end_to_end.read()
        values["lr"], values["tokens"] = max(rates.values()), self.tokens
        for name, coder_values in per_coder.items():
            values.update({f"{key}/{name}": value for key, value in coder_values.items()})
        return values

    def evaluation_weights(self) -> AbstractContextManager[None]:
        """Inside the block coders have the weights to use: averaged ones, where the optimizer averages."""
        if isinstance(self.optimizer, RowOptimizer):
            return self.optimizer.evaluation_weights(self.coders.values())
        return nullcontext()

    def held_out_metrics(self) -> dict[str, dict[str, float]]:
        """FVU and L0 of every coder on the held-out sequences, and end to end the model's ``loss``."""
        with self.evaluation_weights():
            own = held_out_metrics(self.coders, self._held_out(), self._measure, self._strategy.all_sum)
            if self.end_to_end is not None:
                loss = self.end_to_end.measure(self._held_out())
                own = {name: {**measured, "loss": loss} for name, measured in own.items()}
        return self._strategy.gather(own)

    def _held_out(self) -> Batches:
        self.held_out_rows.load_state_dict(self._held_out_start)
        return Batches(self.held_out_rows, self._batches.batch_size, part=self._readers.part)

    def _measure(self, rows: dict[str, Tensor], use: Use) -> None:
        if self.count_tokens([rows])[0][0]:
            self._run(rows, use, at="held-out data")

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on: plain values, and tensors."""
        return {
            "config": self.cfg.to_dict(),
            "processes": self._readers.size,
            "step": self.step,
            "tokens": self.tokens,
            "seconds": time.perf_counter() - self._start,
            "micro_batches": self.micro_batches.parts,
            **self.first_batches.state_dict(),
            "data": self._cursor(),
            "token_buffers": self._shuffles.state_dict(),
            **({} if self.end_to_end is None else {"end_to_end": self.end_to_end.state_dict()}),
            **state_of(self.coders, self.metrics, self.optimizer, self.schedule),
        }

    def load_state_dict(self, state: dict[str, Any], *others: dict[str, Any]) -> None:
        """Go where :meth:`state_dict` was taken; raises :class:`CheckpointError` where other coders or data were.

        ``others``: what it gave on other ranks at the same time, where coders were spread over these.
        """
        parts = (state, *others)
        check_same_coders(list(self.specs), parts)
        self._batches.rows.load_state_dict(state["data"])
        self._cursor = self._batches.rows.snapshot()
        threshold = self.cfg.dead_feature_threshold
        if self.end_to_end is not None:
            self.end_to_end.load_state_dict(state["end_to_end"])
        load_into(self.coders, self.metrics, self.optimizer, self.schedule, parts, threshold)
        self.step, self.tokens, self._seconds = state["step"], state["tokens"], state["seconds"]
        parts_of_batch = max(self.cfg.micro_acc_steps, *(part["micro_batches"] for part in parts))
        self.micro_batches = MicroBatches(parts_of_batch, graphs=self.cfg.cuda_graph)
        self._shuffles.load_state_dict(self._own_buffers(parts))
        self.first_batches.load_state_dicts(*parts)

    def _own_buffers(self, parts: tuple[dict[str, Any], ...]) -> dict[str, Any]:
        own = {name.partition("/")[0] for name in self.coders}
        return {name: held for part in parts for name, held in part["token_buffers"].items() if name in own}

    def _steps(self) -> Iterator[tuple[list[dict[str, Tensor]], Callable[[], dict[str, Any]]]]:
        """Batches of each step, read ahead by a thread, with the cursor after exactly these."""

        def read() -> Iterator[tuple[list[dict[str, Tensor]], Callable[[], dict[str, Any]]]]:
            batches = iter(self._batches)
            while group := list(islice(batches, self.cfg.grad_acc_steps)):
                yield group, self._batches.rows.snapshot()

        return prefetched(read())

    def _model_name(self) -> str:
        return str(self.origin.get("model") or self.source.name)


def _model_pass(model: PreTrainedModel, cfg: TrainConfig) -> ModelPass:
    if cfg.activations is not None:
        raise ConfigError(
            "activations: expected a Trainer of cached activations, got a model; make both of its arguments with: "
            "rows, source = training_data(CachedActivations(cfg.activations), cfg)"
        )
    if not (hasattr(model, "base_model") and hasattr(model, "config")):
        raise ConfigError(
            f"model: expected a model of transformers, got {type(model).__name__} {str(model)[:40]!r}; "
            "load one with fastsae.load_model(NAME, RunConfig()) or AutoModel.from_pretrained"
        )
    hookpoints = find_hookpoints(model, cfg)
    return ModelPass(model, hookpoints, transcode=cfg.sae.transcode, exclude_tokens=cfg.exclude_tokens)
