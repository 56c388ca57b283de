"""fastsae in dictionary_learning: a TopK dictionary for its trainers, with its interface and files.

    from fastsae.compat.dictionary_learning import FastAutoEncoderTopK
    trainSAE(data, [{"trainer": TopKTrainer, "dict_class": FastAutoEncoderTopK, ...}], steps)

Shapes: ``...`` any leading dimensions, D ``activation_dim``, L ``dict_size``, K active latents. What a run saves
is read by the plain library, and by ``fastsae convert``.
"""

from __future__ import annotations

from pathlib import Path

import torch
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from torch import Tensor

from .. import ops
from . import files


class FastAutoEncoderTopK(AutoEncoderTopK):
    """AutoEncoderTopK whose selection is fastsae's: exact, and without a dense sort."""

    def __init__(self, activation_dim: int, dict_size: int, k: int):
        super().__init__(activation_dim, dict_size, k)
        self._k = k  # the buffer ``k`` would have to be read from the device
        self.register_load_state_dict_post_hook(lambda module, _: setattr(module, "_k", int(module.k)))

    def encode(self, x: Tensor, return_topk: bool = False, use_threshold: bool = False):
        """Dense activations [..., L]; with ``return_topk`` also values, indices [..., K] and all of ReLU [..., L]."""
        if use_threshold:
            return super().encode(x, return_topk, use_threshold)
        acts, indices, relu = ops.topk_encode(
            x.reshape(-1, self.activation_dim), self.encoder.weight, self.encoder.bias, self._k,
            b_dec=self.b_dec, return_pre_acts=return_topk, implementation="auto",
        )  # fmt: skip
        acts, indices = (t.reshape(*x.shape[:-1], self._k) for t in (acts, indices))
        dense = acts.new_zeros(*x.shape[:-1], self.dict_size).scatter(-1, indices, acts)
        if not return_topk:
            return dense
        assert relu is not None
        return dense, acts, indices, relu.reshape(dense.shape)

    @classmethod
    def from_pretrained(cls, path: Path | str, k: int | None = None, device: str | torch.device | None = None):
        """The dictionary in an ``ae.pt``, which is read without running code."""
        state = files.read_torch(Path(path))
        found = files.take(state, {"k": "k", "W_enc": "encoder.weight"}, Path(path))
        dict_size, activation_dim = found["W_enc"].shape
        dictionary = cls(activation_dim, dict_size, int(found["k"]) if k is None else k)
        dictionary.load_state_dict(state)
        return dictionary.to(device)
