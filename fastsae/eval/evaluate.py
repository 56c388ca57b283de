"""Evaluation in two passes over the sequences: means first, then coders alone, grafted, and ablations.

Shapes: B sequences, S tokens each, D width. Every measure is summed in float64, sequence by sequence.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor
from transformers import PreTrainedModel

from ..collation import check_rows
from ..errors import ArtifactError, HookpointError
from ..hooks import run_hooked, run_replaced
from ..model_loss import check_has_head
from ..placement import entry_device
from ..progress import console
from ..saved import check_origin, check_places, coder_input
from .batches import Batch, read_batches
from .config import EvalConfig
from .cross_entropy import LossSums, constant, cross_entropy, graft
from .reconstruction import OutputMean, ReconstructionSums, decoder_cosines
from .result import CoderEvaluation, Evaluation, JointEvaluation
from .subjects import Coders, Subject, make_groups, make_subjects


def evaluate(
    coders: Coders | Mapping[str, Coders],
    model: PreTrainedModel,
    tokens: Any,
    cfg: EvalConfig | None = None,
    *,
    model_name: str | None = None,
    progress: bool = True,
) -> Evaluation:
    """Measure coders on ``model`` over ``tokens``, rows of ``input_ids`` of one length.

    ``coders`` maps names (``h.0.mlp``, or ``h.0.mlp/seed1``) to coders, as ``FastSae.load_many`` gives them, or
    several such mappings by a label, to stand side by side. The model needs its LM head unless ``cfg.ce`` is
    off; it is left as it was, also after an error. Every sequence counts, so pass held-out ones. ``model_name``
    is what the coders' notes are held against, by default the model's own.

    Raises :class:`CheckpointError` for a coder of another model, hookpoint or width, unless ``cfg.force`` (a
    width is never forced), :class:`HookpointError` where there is no such module.
    """
    cfg = cfg or EvalConfig()
    subjects = make_subjects(coders, entry_device(model))
    name = model_name or model.name_or_path or ""
    return _Evaluator(subjects, model, tokens, cfg, name).run(progress)


class _Evaluator:
    def __init__(self, subjects: list[Subject], model: PreTrainedModel, tokens: Any, cfg: EvalConfig, name: str):
        self.subjects, self.model, self.tokens, self.cfg, self.model_name = subjects, model, tokens, cfg, name
        check_rows(tokens)
        if len(tokens) == 0:
            raise ArtifactError("dataset: expected at least one sequence to evaluate on, got none")
        if cfg.ce:
            check_has_head(model, "ce", "turn ce off")
        self.calls = self._check()
        self.groups = make_groups(subjects)
        self.losses: dict[tuple, LossSums] = defaultdict(LossSums)

    def run(self, progress: bool) -> Evaluation:
        batches = -(-len(self.tokens) // self.cfg.batch_size)
        with Progress(console=console, disable=not progress) as bar:
            task = bar.add_task("evaluating", total=2 * batches)

            def advance() -> None:
                bar.advance(task)

            means = self._means(advance)
            sums = {s[:2]: ReconstructionSums(s.coder.num_latents, means[s.hookpoint]) for s in self.subjects}
            for batch in self._batches():
                if self.cfg.ce:
                    self._losses(batch, sums, means)
                else:
                    self._run(batch, lambda *seen, batch=batch: self._measure(batch, sums, *seen))
                advance()
        return self._result(sums)

    # ---- passes of the model ----

    def _means(self, advance: Callable[[], None]) -> dict[str, Tensor]:
        means = {name: OutputMean() for name in self.calls}
        kept = 0
        for batch in self._batches():
            self._run(batch, lambda name, _x, y, kept=batch.kept: means[name].add(_tokens(name, y, kept), kept))
            kept += batch.input_ids.numel() if batch.kept is None else int(batch.kept.sum())
            advance()
        if not kept:
            raise ArtifactError("dataset: expected tokens to measure, got none: all are excluded or masked")
        return {name: mean.read() for name, mean in means.items()}

    @torch.no_grad()
    def _measure(self, batch: Batch, sums: dict, name: str, x: Tensor | None, y: Tensor) -> None:
        for subject in self.subjects:
            if subject.hookpoint == name:
                sums[subject[:2]].add(y, subject.coder(coder_input(subject.coder, x, y), y), batch.kept)

    def _losses(self, batch: Batch, sums: dict, means: dict[str, Tensor]) -> None:
        """The model as it is, with activations measured on the way; then once for every replacement."""

        def observe(name: str):
            def replacement(x: Tensor | None, y: Tensor) -> Tensor:
                self._measure(batch, sums, name, x, y)
                return y

            return replacement

        clean = self._logits(batch, {name: observe(name) for name in self.calls})
        self.losses["clean",].add(clean, clean, batch.input_ids, batch.attended)
        for key, replacements in self._replacements(batch, means):
            self.losses[key].add(self._logits(batch, replacements), clean, batch.input_ids, batch.attended)

    def _replacements(self, batch: Batch, means: dict[str, Tensor]) -> Iterator[tuple[tuple, dict]]:
        """(key, what to replace) of every run of the model: each ablation once, however many coders share it."""
        for subject in self.subjects:
            yield ("graft", *subject[:2]), {subject.hookpoint: graft(subject.coder, batch.kept)}
        for group, coders in self.groups.items():
            yield ("graft", group), {name: graft(coder, batch.kept) for name, coder in coders.items()}
        places = {(name,) for name in self.calls} | {tuple(coders) for coders in self.groups.values()}
        for names in sorted(places):
            yield ("zero", names), {n: constant(torch.zeros_like(means[n]), batch.kept) for n in names}
            yield ("mean", names), {n: constant(means[n], batch.kept) for n in names}

    def _run(self, batch: Batch, callback) -> None:
        run_hooked(self.model, batch.input_ids, self.calls, callback, batch.attention_mask)

    def _logits(self, batch: Batch, replacements: dict) -> Tensor:
        return run_replaced(self.model, batch.input_ids, replacements, batch.attention_mask)

    # ---- what comes in, what goes out ----

    def _check(self) -> dict[str, int]:
        """How often each hookpoint is called; every coder must fit the place that it is on."""
        for subject in () if self.cfg.force else self.subjects:
            check_origin(subject.name, subject.coder, self.model_name)
        return check_places(self.model, ((subject.name, subject.coder) for subject in self.subjects))

    def _batches(self) -> Iterator[Batch]:
        return read_batches(self.tokens, self.cfg.batch_size, self.model, self.cfg.exclude_tokens)

    def _result(self, sums: dict[tuple, ReconstructionSums]) -> Evaluation:
        rows = tuple(
            CoderEvaluation(
                coders=subject.source, name=subject.name, hookpoint=subject.hookpoint,
                reconstruction=sums[subject[:2]].read(self.cfg.dense_above),
                decoder=decoder_cosines(subject.decoder),
                cross_entropy=self._cross_entropy(("graft", *subject[:2]), (subject.hookpoint,)),
            )
            for subject in self.subjects
        )  # fmt: skip
        together = tuple(
            JointEvaluation(group[0], tuple(f"{name}/{group[1]}" if group[1] else name for name in coders), measured)
            for group, coders in self.groups.items()
            if (measured := self._cross_entropy(("graft", group), tuple(coders)))
        )
        first = rows[0].reconstruction
        return Evaluation(self.model_name, first.tokens, first.sequences, rows, together)

    def _cross_entropy(self, key: tuple, names: tuple[str, ...]):
        if not self.cfg.ce:
            return None
        return cross_entropy(
            self.losses["clean",], self.losses[key], self.losses["zero", names], self.losses["mean", names]
        )


def _tokens(name: str, y: Tensor, kept: Tensor | None) -> Tensor:
    if y.ndim != 3 or (kept is not None and y.shape[:2] != kept.shape):
        raise HookpointError(
            f"{name}: expected activations [sequences, tokens, width] to evaluate, got {list(y.shape)}"
        )
    return y
