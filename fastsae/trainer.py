"""Trainer: one pass of a model over a dataset trains a coder at every hookpoint.

"step" is an optimizer step, "batch" a batch of sequences. What a step does is in :mod:`.train_step`; here is what a run
does: steps, records, when to save, stopping and its end.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NoReturn

from .checkpoint import write_json
from .errors import ArtifactError
from .interrupt import Interrupted, StopSignals
from .progress import CoderSummary, RunSummary, TrainProgress
from .run_folder import create_run_folder
from .saving_trainer import SavingTrainer
from .tracking import Silence, Tracker
from .training_state import drop_states

IDLE_BATCHES = 32
"""Batches from the first on without a token to train on, after which a run ends: there will be none."""


class Trainer(SavingTrainer):
    """Train coders on the activations of ``model`` over ``dataset`` (rows of ``input_ids``, equally long).

    ``model`` is any Hugging Face model; it is left as it was found. (Or what stands in its place: see
    :func:`fastsae.training_data`.) ``dataset`` has ``len`` and ``[i]``, or is a
    :class:`fastsae.rows.RowSource`. ``coders`` maps names (``h.0.mlp.act``, with several seeds
    ``h.0.mlp.act/seed1``) to :class:`FastSae`. ``origin`` is stored in the run's config.json.
    """

    def fit(self, *, progress: bool = True) -> RunSummary:
        """Train to the end of the dataset, save, measure on the held-out sequences.

        Ctrl-C and SIGTERM end it after the step at work, saved; :class:`Interrupted` says how to go on.
        """
        self._start = time.perf_counter() - self._seconds
        config = {**self.cfg.to_dict(), **self.origin}
        resumed = self.folder is not None
        if self.folder is None:
            self.folder = self._create_folder(config)
        if self.world.first:
            self._lock.take(self.folder)
        tracker = Tracker(self.folder, self.cfg.log_to, config) if self.world.first else Silence()
        again = self.world.size == 1  # torchrun sends signals twice, and ends what does not end itself
        try:
            with TrainProgress(self.total_steps, progress and self.world.first) as bar, StopSignals(again) as signals:
                bar.advance(self.step)
                if resumed:
                    self._save_coders()  # a crash may have come between the state and the coders
                self._train(tracker, bar, signals)
            summary = self.summarise(time.perf_counter() - self._start)
            self.world.wait()
            if self.world.first:
                drop_states(self.folder)
        finally:
            tracker.close()
            self._lock.free()
        return summary

    def _create_folder(self, config: dict[str, Any]) -> Path:
        folder = None
        if self.world.first:
            folder = create_run_folder(self.cfg, self._model_name())
            write_json(folder / "config.json", config)
        return Path(self.world.share(str(folder)))

    def _train(self, tracker: Tracker | Silence, bar: TrainProgress, signals: StopSignals) -> None:
        logged = self.step
        for batches, cursor in self._steps():
            counts, signal = self.count_tokens(batches, signals.received or 0)
            if signal and self.step:
                self._stop(signal)
            self.train_step(batches, counts)
            self._cursor = cursor
            bar.advance()
            if self.step % self.cfg.log_every == 0 or self.step == self.total_steps:
                self._log(tracker, bar)
                logged = self.step
            if self.tokens == 0 and self.step * self.cfg.grad_acc_steps >= IDLE_BATCHES:
                self._refuse_no_tokens()
            if self._save_is_due() and self.step < self.total_steps and self.tokens:
                self.save()
        if self.tokens == 0:
            self._refuse_no_tokens()
        if logged < self.step:  # a stream that ended before its limit
            self._log(tracker, bar)
        self._ended = True
        self.save()

    def _refuse_no_tokens(self) -> NoReturn:
        raise ArtifactError(
            f"dataset: expected tokens to train on, got none in {self.step * self.cfg.grad_acc_steps} batches: all are "
            "excluded or masked; check --exclude-tokens and the attention_mask"
        )

    def _log(self, tracker: Tracker | Silence, bar: TrainProgress) -> None:
        values = self.read_metrics()
        values["tokens_per_second"] = self.tokens / (time.perf_counter() - self._start)
        try:
            tracker.log(self.step, values)
        except OSError as error:
            raise ArtifactError(
                f"output: could not write {self.folder}/metrics.jsonl: {error.strerror}; "
                f"free some space, then: fastsae train --resume {self.folder}"
            ) from None
        bar.show(values["tokens_per_second"], values["fvu"])

    def summarise(self, seconds: float) -> RunSummary:
        """The end of a run, in numbers."""
        assert self.folder is not None
        held_out = self.held_out_metrics()
        window = min(self.cfg.dead_feature_threshold, self.tokens // 2)
        rows = {
            name: CoderSummary(
                name=name,
                fvu=held_out[name]["fvu"],
                l0=held_out[name]["l0"],
                dead_pct=metrics.dead_pct(window),
                tokens=self.tokens,
                seconds=metrics.stopwatch.read(),
            )
            for name, metrics in self.metrics.items()
        }
        rows = tuple(self._strategy.gather(rows).values())
        return RunSummary(folder=self.folder, coders=rows, seconds=seconds, dead_window=window)

    def _stop(self, signum: int) -> None:
        if self._saved != self.step:
            self.save()
        raise Interrupted(
            f"stopped and saved after step {self.step} of {self.total_steps}; "
            f"go on with: fastsae train --resume {self.folder}", signum,
        )  # fmt: skip
