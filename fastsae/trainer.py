"""Trainer: one pass of a model over a dataset trains a coder at every hookpoint.

Shapes: B sequences, S tokens each, N tokens after masking, D width. "step" is an optimizer step, "batch" a
batch of sequences. A coder's forward and backward run inside the model's forward, as its activations
appear: only one hookpoint's activations are alive at a time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import PreTrainedModel

from . import loss
from .batches import ModelBatch, prefetched, prepare
from .checkpoint import write_json
from .coders import find_hookpoints, init_biases, make_coders
from .config import TrainConfig
from .data import collate, held_out_sequences
from .errors import ArtifactError, HookpointError
from .hooks import run_hooked
from .joint import joint_step
from .metrics import HeldOutMetrics, TrainingMetrics
from .optim import apply_gradients, learning_rates, make_optimizer, make_schedule
from .progress import CoderSummary, RunSummary, TrainProgress
from .row_optimizer import RowOptimizer
from .run_folder import create_run_folder
from .sae import FastSae
from .tracking import Tracker
from .version import __version__


class Trainer:
    """Train coders on the activations of ``model`` over ``dataset`` (rows of ``input_ids``, equally long).

    ``model`` is any Hugging Face model; it is left as it was found. ``coders`` maps names (``h.0.mlp.act``,
    with several seeds ``h.0.mlp.act/seed1``) to :class:`FastSae`. ``origin`` is stored in the run's
    config.json.
    """

    def __init__(self, cfg: TrainConfig, dataset: Any, model: PreTrainedModel, *, origin: dict[str, Any] | None = None):
        self.cfg, self.model, self.origin = cfg, model, origin or {}
        held_out = held_out_sequences(cfg.held_out, len(dataset))
        cut = len(dataset) - held_out
        self.train_rows = Subset(dataset, range(cut))
        self.held_out_rows = Subset(dataset, range(cut, len(dataset)))
        batches = -(-cut // cfg.batch_size)
        self.total_steps = -(-batches // cfg.grad_acc_steps)
        if self.total_steps == 0:
            raise ArtifactError("dataset: expected at least one sequence to train on, got none")

        self.hookpoints = find_hookpoints(model, cfg)
        self.coders = make_coders(cfg, self.hookpoints, model)
        self.metrics = {name: TrainingMetrics(name, coder) for name, coder in self.coders.items()}
        low_dtype = model.dtype if model.device.type == "cuda" and model.dtype != torch.float32 else None
        self.optimizer = make_optimizer(cfg, self.coders.values(), low_dtype)
        self.schedule = make_schedule(cfg, self.optimizer, self.total_steps)
        self._in_place = self._can_update_in_place()
        self._vocabulary = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
        self.step = 0
        self.tokens = 0
        self._initialised: set[str] = set()

    def fit(self, *, progress: bool = True) -> RunSummary:
        """Train to the end of the dataset, save, measure on the held-out sequences."""
        start = time.perf_counter()
        self.folder = create_run_folder(self.cfg, self._model_name())
        config = {**self.cfg.to_dict(), **self.origin}
        write_json(self.folder / "config.json", config)
        tracker = Tracker(self.folder, self.cfg.log_to, config)
        try:
            with TrainProgress(self.total_steps, progress) as bar:
                for batches in self._steps():
                    self.train_step(batches)
                    bar.advance()
                    if self.step % self.cfg.log_every == 0 or self.step == self.total_steps:
                        values = self.read_metrics()
                        values["tokens_per_second"] = self.tokens / (time.perf_counter() - start)
                        tracker.log(self.step, values)
                        bar.show(values["tokens_per_second"], values["fvu"])
                    if self.step % self.cfg.save_every == 0 and self.step < self.total_steps and self.tokens:
                        self.save()
            if self.tokens == 0:
                raise ArtifactError(
                    "dataset: expected tokens to train on, got none: all are excluded or masked; "
                    "check --exclude-tokens and the attention_mask"
                )
            self.save()
            return self.summarise(time.perf_counter() - start)
        finally:
            tracker.close()

    def train_step(self, batches: list[dict[str, Tensor]]) -> None:
        """One optimizer step on the summed gradients of ``batches`` (each with ``input_ids [B, S]``)."""
        self._share = 1 / len(batches)
        tokens = 0
        for rows in batches:
            batch = self._prepare(rows)
            self._batch = batch
            tokens += batch.tokens
            self._run_model(batch, self._train_hookpoint)
        self._lr = max(learning_rates(self.optimizer))
        apply_gradients(self.optimizer, self.coders.values())
        self.schedule.step()
        auxk = self.cfg.auxk_alpha > 0 and self.tokens + tokens > self.cfg.dead_feature_threshold
        for metrics in self.metrics.values():
            metrics.end_step(tokens, self.cfg.dead_feature_threshold if auxk else None)
        self.step += 1
        self.tokens += tokens

    def read_metrics(self) -> dict[str, float]:
        """Means since the last reading; raises :class:`NonFiniteError` where training broke down."""
        values: dict[str, float] = {}
        threshold = self.cfg.dead_feature_threshold
        per_coder = {name: metrics.read(threshold) for name, metrics in self.metrics.items()}
        values["fvu"] = sum(v["fvu"] for v in per_coder.values()) / len(per_coder)
        values["lr"], values["tokens"] = self._lr, self.tokens
        for name, coder_values in per_coder.items():
            values.update({f"{key}/{name}": value for key, value in coder_values.items()})
        return values

    def save(self) -> None:
        """Write every coder into the run's folder, unless the training of any of them broke down."""
        for metrics in self.metrics.values():
            metrics.check()
            metrics.check_weights(self.step)
        with self.evaluation_weights():
            for name, coder in self.coders.items():
                coder.notes = {**self._notes(), "hookpoint": name.partition("/")[0]}
                coder.save_to_disk(self.folder / name)

    def evaluation_weights(self) -> AbstractContextManager[None]:
        """Inside the block coders have the weights to use: averaged ones, where the optimizer averages."""
        if isinstance(self.optimizer, RowOptimizer):
            return self.optimizer.evaluation_weights(self.coders.values())
        return nullcontext()

    @torch.no_grad()
    def held_out_metrics(self) -> dict[str, dict[str, float]]:
        """FVU and L0 of every coder on the held-out sequences."""
        measured = {name: HeldOutMetrics(coder.d_in, coder.device) for name, coder in self.coders.items()}

        def measure(name: str, inputs: Tensor | None, output: Tensor) -> None:
            x, y = self._tokens(name, inputs, output)
            for coder_name, coder in self._coders_at(name) if len(y) else ():
                measured[coder_name].add(y, coder(x, y))

        with self.evaluation_weights():
            for rows in self._loader(self.held_out_rows):
                self._batch = self._prepare(rows)
                self._run_model(self._batch, measure)
        return {name: metrics.read() for name, metrics in measured.items()}

    def summarise(self, seconds: float) -> RunSummary:
        """The end of a run, in numbers."""
        held_out = self.held_out_metrics()
        window = min(self.cfg.dead_feature_threshold, self.tokens // 2)
        rows = (
            CoderSummary(
                name=name,
                fvu=held_out[name]["fvu"],
                l0=held_out[name]["l0"],
                dead_pct=100 * metrics.dead(window).float().mean().item(),
                tokens=self.tokens,
                seconds=metrics.stopwatch.read(),
            )
            for name, metrics in self.metrics.items()
        )
        return RunSummary(folder=self.folder, coders=tuple(rows), seconds=seconds, dead_window=window)

    # ---- inside the model's forward ----

    def _train_hookpoint(self, name: str, inputs: Tensor | None, output: Tensor) -> None:
        x, y = self._tokens(name, inputs, output)
        if len(y) == 0:
            return
        variance, chunks = loss.total_variance(y), self.cfg.micro_acc_steps
        optimizer = self.optimizer if self._in_place and isinstance(self.optimizer, RowOptimizer) else None
        for coder_name, coder in self._coders_at(name):
            if coder_name not in self._initialised:
                init_biases(coder, x, y)
                self._initialised.add(coder_name)
            metrics = self.metrics[coder_name]
            with metrics.stopwatch:
                for x_part, y_part in zip(x.chunk(chunks), y.chunk(chunks), strict=True):
                    losses = joint_step(
                        coder, x_part, y_part, variance, self.cfg,
                        dead=metrics.dead_ids(), share=self._share, optimizer=optimizer,
                    )  # fmt: skip
                    metrics.add(losses, len(y_part) / len(y))
            metrics.watch(self.step + 1, variance)

    def _can_update_in_place(self) -> bool:
        """Whether matrices can take their step inside the backward pass: nothing else needs their gradients."""
        once = all(hookpoint.calls == 1 for hookpoint in self.hookpoints.values())
        autograd = self.cfg.sae.multi_topk and self.cfg.sae.activation != "topk"
        return self.cfg.grad_acc_steps == self.cfg.micro_acc_steps == 1 and once and not autograd

    def _tokens(self, name: str, inputs: Tensor | None, output: Tensor) -> tuple[Tensor, Tensor]:
        """(x, y) as [N, D] after masking; for an autoencoder both are the module's output."""
        positions, shape = self._batch.positions, self._batch.ids.shape
        if positions is not None and output.shape[:-1] != shape:
            raise HookpointError(
                f"{name}: expected activations {list(shape)} tokens by width to leave tokens out, "
                f"got {list(output.shape)}; train this hookpoint without --exclude-tokens and attention masks"
            )

        def kept(activations: Tensor) -> Tensor:
            rows = activations.flatten(0, -2)
            return rows if positions is None else rows.index_select(0, positions)

        y = kept(output)
        if not self.cfg.sae.transcode:
            return y, y
        assert inputs is not None
        return kept(inputs), y

    def _coders_at(self, hookpoint: str) -> Iterator[tuple[str, FastSae]]:
        return ((name, coder) for name, coder in self.coders.items() if name.partition("/")[0] == hookpoint)

    def _run_model(self, batch: ModelBatch, callback) -> None:
        calls = {name: hookpoint.calls for name, hookpoint in self.hookpoints.items()}
        run_hooked(self.model, batch.ids, calls, callback, batch.attention_mask)

    # ---- data ----

    def _steps(self) -> Iterator[list[dict[str, Tensor]]]:
        batches = prefetched(self._loader(self.train_rows))
        while group := list(islice(batches, self.cfg.grad_acc_steps)):
            yield group

    def _loader(self, rows: Dataset) -> DataLoader:
        pin = self.model.device.type == "cuda"
        return DataLoader(rows, batch_size=self.cfg.batch_size, collate_fn=collate, pin_memory=pin)

    def _prepare(self, rows: dict[str, Tensor]) -> ModelBatch:
        return prepare(rows, torch.tensor(self.cfg.exclude_tokens), self._vocabulary, self.model.device)

    def _model_name(self) -> str:
        return str(self.origin.get("model") or self.model.name_or_path or type(self.model).__name__)

    def _notes(self) -> dict[str, Any]:
        return {"version": __version__, "model": self._model_name(), "step": self.step, "tokens": self.tokens}
