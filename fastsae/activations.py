"""Where activations come from: one pass of the model over a batch, as rows of tokens that count.

Shapes: B sequences, S tokens each, N tokens that count, D width in, E width out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .batches import ModelBatch, counted, prepare
from .errors import ArtifactError, FastsaeError, HookpointError, OutOfMemoryError, first_line, is_out_of_memory
from .hookpoints import Hookpoint
from .hooks import run_hooked, run_replaced
from .placement import entry_device
from .shards import find_slices, is_lost_peer, join, lost_peer, processes

Use = Callable[[str, Tensor, Tensor], None]
"""Called as ``use(hookpoint, x [N, D], y [N, E])``, once per module call; for an autoencoder both are y."""

Graft = Callable[[str, Tensor, Tensor], Tensor]
"""Called as :data:`Use`; what the module gives instead, [N, E]."""


class ActivationSource(ABC):
    """Gives the activations of batches at ``hookpoints``: of a model that runs (:class:`ModelPass`), or from a disk."""

    name: str
    """Hub id or folder of the model."""
    device: torch.device
    dtype: torch.dtype
    hookpoints: dict[str, Hookpoint]
    shared: bool = False
    """Whether all ranks run one model together, which takes the same batches in each of them."""

    @abstractmethod
    def count(self, rows: dict[str, Tensor]) -> int:
        """N, before any work is done."""

    @abstractmethod
    def run(self, rows: dict[str, Tensor], use: Use, *, at: str, empty: bool = False) -> int:
        """Hand a batch's activations to ``use``, hookpoint by hookpoint, without gradients; returns N.

        ``empty``: also where no token counts, for ranks that must take the same steps. What goes wrong names the
        hookpoint, and where in the run: ``at`` is such as ``step 7``.
        """


class ModelPass(ActivationSource):
    """Runs ``model`` and hands over what is at its ``hookpoints``; ``transcode``: also what comes into them."""

    def __init__(
        self,
        model: PreTrainedModel,
        hookpoints: dict[str, Hookpoint],
        *,
        transcode: bool = False,
        exclude_tokens: Sequence[int] = (),
    ):
        self.model, self.hookpoints, self._transcode = model, hookpoints, transcode
        self.name = str(model.name_or_path or type(model).__name__)
        self.device, self.dtype = entry_device(model), model.dtype
        self._excluded = torch.tensor(exclude_tokens)
        self.shared = processes(model) > 1
        self._slices = find_slices(model, list(hookpoints)) if self.shared else {}
        self._vocabulary = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings

    def count(self, rows: dict[str, Tensor]) -> int:
        counts = counted(rows, self._excluded)
        return rows["input_ids"].numel() if counts is None else int(counts.sum())

    def run(self, rows: dict[str, Tensor], use: Use, *, at: str, empty: bool = False) -> int:
        """``rows`` are ``input_ids [B, S]``, on the CPU."""
        batch = self.prepare(rows)
        calls = {name: hookpoint.calls for name, hookpoint in self.hookpoints.items()}
        silent = set(calls)
        using: list[str] = []

        def callback(name: str, inputs: Tensor | None, output: Tensor) -> None:
            using.append(name)
            silent.discard(name)
            x, y = self._tokens(name, batch, inputs, output, at)
            if len(y) or empty:
                use(name, x, y)
            using.pop()

        with _named_errors(batch.ids, at, using):
            run_hooked(self.model, batch.ids, calls, callback, batch.attention_mask)
        if silent:
            raise HookpointError(f"{min(silent)}, {at}: expected a float tensor from the model's forward, got none")
        return batch.tokens

    def prepare(self, rows: dict[str, Tensor]) -> ModelBatch:
        """``rows`` on the model's device, with the tokens that count."""
        return prepare(rows, self._excluded, self._vocabulary, self.device)

    def logits(self, batch: ModelBatch, graft: Graft | None = None, *, at: str, gradients: bool = False) -> Tensor:
        """The logits [B, S, V] of a model with an LM head; ``graft`` says what hookpoints give at tokens that count.

        It is asked where there are none, too: ranks must take the same steps. Elsewhere modules give what they gave.
        ``gradients``: of what ``graft`` brings; never of the model's parameters.
        """
        using: list[str] = []

        def replacement(name: str, inputs: Tensor | None, output: Tensor) -> Tensor:
            using.append(name)
            x, y = self._tokens(name, batch, inputs, output, at)
            assert graft is not None
            output = _put_back(batch, graft(name, x, y).to(output.dtype), output)
            using.pop()
            return output

        replacements = {name: partial(replacement, name) for name in self.hookpoints} if graft is not None else {}
        with _named_errors(batch.ids, at, using):
            return run_replaced(self.model, batch.ids, replacements, batch.attention_mask, gradients=gradients)

    def _tokens(
        self, name: str, batch: ModelBatch, inputs: Tensor | None, output: Tensor, at: str
    ) -> tuple[Tensor, Tensor]:
        """(x, y) after masking, of slices the whole."""
        if name in self._slices:
            output = join(output, self._slices[name].output)
            if inputs is not None and self._transcode:
                inputs = join(inputs, self._slices[name].input)
        positions, shape = batch.positions, batch.ids.shape
        if positions is not None and batch.tokens and output.shape[:-1] != shape:
            raise HookpointError(
                f"{name}: expected activations {list(shape)} tokens by width to leave tokens out, "
                f"got {list(output.shape)}; train this hookpoint without --exclude-tokens and attention masks"
            )
        self._check_width(name, output, self.hookpoints[name].d_out, at)

        def kept(activations: Tensor) -> Tensor:
            rows = activations.flatten(0, -2)
            if not batch.tokens:
                return rows[:0]
            return rows if positions is None else rows.index_select(0, positions)

        y = kept(output)
        if not self._transcode:
            return y, y
        if inputs is None:
            raise HookpointError(f"{name}, {at}: expected a float tensor as the module's input, got none")
        self._check_width(name, inputs, self.hookpoints[name].d_in, at)
        return kept(inputs), y

    @staticmethod
    def _check_width(name: str, activations: Tensor, width: int | None, at: str) -> None:
        if activations.shape[-1] != width:
            raise HookpointError(f"{name}, {at}: expected activations of width {width}, got {list(activations.shape)}")


def _put_back(batch: ModelBatch, new: Tensor, output: Tensor) -> Tensor:  # [N, D], [..., D] -> [..., D]
    """``output`` with its tokens that count replaced."""
    if batch.positions is None:
        return new.view_as(output)
    if not batch.tokens:
        return output
    return output.flatten(0, -2).index_copy(0, batch.positions, new).view_as(output)


@contextmanager
def _named_errors(ids: Tensor, at: str, using: list[str]) -> Iterator[None]:
    """What the model raises, and not whoever is ``using`` its activations, says where and on what."""
    try:
        yield
    except FastsaeError:
        raise
    except Exception as error:
        if using:
            raise
        raise _model_error(error, ids, at) from error


def _model_error(error: Exception, ids: Tensor, at: str) -> FastsaeError:
    shape = " x ".join(map(str, ids.shape))
    if is_out_of_memory(error):
        return OutOfMemoryError(
            f"{at}: out of memory in the model's forward on {shape} tokens; lower --batch-size or --ctx-len, "
            "with --grad-acc-steps raised for as many tokens in a step"
        )
    if is_lost_peer(error):
        return lost_peer(error)
    return ArtifactError(
        f"model, {at}: expected its forward to run on {shape} token ids, "
        f"got {type(error).__name__}: {first_line(error)}"
    )
