"""sparsify's names on fastsae: programs change ``from sparsify`` into ``from fastsae.compat.sparsify``.

Coders are :class:`fastsae.FastSae`, which reads and writes sparsify's files. ``encode`` gives no dense ``pre_acts``
unless asked for (``return_pre_acts=True``), and any leading shape will do.
"""

from ...sae import FastSae
from .config import SaeConfig, SparseCoderConfig, TrainConfig, TranscoderConfig
from .trainer import SaeTrainer, Trainer

Sae = SparseCoder = FastSae

__all__ = [
    "Sae",
    "SaeConfig",
    "SaeTrainer",
    "SparseCoder",
    "SparseCoderConfig",
    "TrainConfig",
    "Trainer",
    "TranscoderConfig",
]
