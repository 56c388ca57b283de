"""What a run keeps on disk: its training state and its coders, written together; and going on from them."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from .resume import check_same_run, rewind_metrics
from .run_lock import RunLock
from .saving import keep_best, keep_checkpoint, save_coders
from .train_step import StepTrainer
from .training_state import begin_state, check_has_state, end_state, read_newest_state, write_part
from .version import __version__


class SavingTrainer(StepTrainer):
    """Writes itself into ``folder``, whole or not at all, and goes on from there; :class:`Trainer` says when."""

    folder: Path | None = None
    """The run's, from its first step on."""
    _ended = False
    _saved = 0  # after which step

    @cached_property
    def _lock(self) -> RunLock:
        return RunLock()

    def save(self) -> None:
        """Write the training state and every coder into the run's folder, unless the training of any broke down."""
        assert self.folder is not None
        for metrics in self.metrics.values():
            metrics.check()
            metrics.check_weights(self.step)
        self._save_state()
        self._save_coders()
        self._saved = self.step

    def _save_state(self) -> None:
        assert self.folder is not None
        number, parts = self._strategy.part
        if self.world.first:
            begin_state(self.folder, self.step)
        self.world.wait()
        if number < parts:
            write_part(self.folder, self.step, self.state_dict(), number, parts)
        self.world.wait()
        if self.world.first:
            end_state(self.folder, self.step)

    def _save_coders(self) -> None:
        assert self.folder is not None
        for name, coder in self.coders.items():
            coder.notes = self._notes(name)
        checkpoint = self._save_is_due() or self._ended  # else a stop, which leaves no trace
        held_out = self.held_out_metrics() if self.cfg.save_best and checkpoint else None
        number, parts = self._strategy.part
        if number < parts:
            with self.evaluation_weights():
                save_coders(self.folder, self.coders)
        self.world.wait()
        if self.world.first and checkpoint:
            keep_checkpoint(self.folder, self.specs, self.step, self.cfg.keep_last)
        if self.world.first and held_out is not None:
            keep_best(self.folder, self.step, held_out)

    def _save_is_due(self) -> bool:
        return self.step % self.cfg.save_every == 0

    def resume(self, folder: Path | str) -> None:
        """Go to where the run in ``folder`` was last saved; :meth:`fit` goes on from there, bit by bit on a CPU.

        The trainer must have been made with the run's own config, model and dataset. Raises
        :class:`CheckpointError` where there is no whole training state, or it is another run's,
        :class:`ArtifactError` while another process trains it.
        """
        with self.world.one_first(of_machine=False):  # which may delete a damaged one
            if self.world.first:
                check_has_state(Path(folder))
                self._lock.take(Path(folder))
            step, parts = read_newest_state(Path(folder))
        check_same_run(self.cfg, parts[0], self._readers.size)
        self.load_state_dict(*parts)
        if self.world.first:
            rewind_metrics(Path(folder), step)
        self.folder = Path(folder)

    def _notes(self, name: str) -> dict[str, Any]:
        hookpoint = name.partition("/")[0]
        return {
            "version": __version__, "model": self._model_name(), "step": self.step, "tokens": self.tokens,
            "hookpoint": hookpoint, "width": self.hookpoints[hookpoint].d_out,
            **({"revision": self.origin["revision"]} if self.origin.get("revision") else {}),
            **self.first_batches.sizes.get(hookpoint, {}),
        }  # fmt: skip
