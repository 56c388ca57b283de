"""fastsae_kernels: exact TopK encoding and sparse decoding, forward and backward.

    from fastsae_kernels import topk_encode, sparse_decode

Needs torch; Triton only where ``implementation="triton"`` is used. See ``kernels/README.md``.
"""

from .autograd import SparseDecode, TopKEncode, sparse_decode, topk_encode
from .reference import EncoderOutput

__all__ = ["EncoderOutput", "SparseDecode", "TopKEncode", "sparse_decode", "topk_encode"]
