"""The ``triton`` backend: the primitives that :mod:`.autograd` differentiates, as launched kernels."""

from .act_grad import act_grad
from .decode import decode
from .latent_grad import decode_backward, encode_backward
from .select import select
from .encode import encode

__all__ = ["act_grad", "decode", "decode_backward", "encode", "encode_backward", "select"]
