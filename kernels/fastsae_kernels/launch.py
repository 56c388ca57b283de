"""The ``triton`` backend: the primitives that :mod:`.autograd` differentiates, as launched kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import act_grad as _act_grad
from . import backward as _backward
from . import decode as _decode
from . import encode as _encode
from . import select as _select


def _on_its_device(primitive: Callable[..., Any]) -> Callable[..., Any]:
    """``primitive`` with the device of its first tensor current: Triton launches there, wherever the tensors are."""

    @functools.wraps(primitive)
    def launch(first: Tensor, *rest: Any, **options: Any) -> Any:
        with torch.cuda.device_of(first):
            return primitive(first, *rest, **options)

    return launch


act_grad = _on_its_device(_act_grad.act_grad)
decode = _on_its_device(_decode.decode)
decode_backward = _on_its_device(_backward.decode_backward)
encode = _on_its_device(_encode.encode)
encode_backward = _on_its_device(_backward.encode_backward)
select = _on_its_device(_select.select)
