"""fastsae_kernels: exact TopK encoding and sparse decoding, forward and backward.

    from fastsae_kernels import topk_encode, sparse_decode

Needs torch; Triton only where ``implementation="triton"`` is used. See ``kernels/README.md``.
"""

from .autograd import SparseDecode, TopKEncode, sparse_decode, topk_encode
from .reference import EncoderOutput
from .rules import Adam, Adam8bit, Signum
from .step import Block, Coder, GradSink, Loss, Rows, RowStep, StepOutput, coder_step, select_batch
from .varying import VaryingEncode, batch_topk_encode, threshold_encode

__all__ = [
    "Adam",
    "Adam8bit",
    "Block",
    "Coder",
    "EncoderOutput",
    "GradSink",
    "Loss",
    "RowStep",
    "Rows",
    "Signum",
    "SparseDecode",
    "StepOutput",
    "TopKEncode",
    "VaryingEncode",
    "batch_topk_encode",
    "coder_step",
    "select_batch",
    "sparse_decode",
    "threshold_encode",
    "topk_encode",
]
