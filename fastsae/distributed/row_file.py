"""A whole coder's safetensors file, written row by row as other ranks send theirs: no rank ever holds all of it.

The format (https://huggingface.co/docs/safetensors): eight bytes of length, a JSON header with each tensor's dtype,
shape and place, then the tensors' bytes. The library writes only what is in memory at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch
import torch.distributed as dist
from torch import Tensor

from ..checkpoint import ROWS
from .latent_peers import LatentPeers

BLOCK_BYTES = 64 << 20

DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.float16: "F16", torch.bfloat16: "BF16"}


def receive_file(path: Path, tensors: dict[str, Tensor], peers: LatentPeers) -> None:
    """Write ``path``: of the tensors in ``ROWS`` all ranks' rows, of the others this rank's."""
    header, end = {}, 0
    for name in sorted(tensors):
        tensor = tensors[name]
        shape = [peers.num_latents, *tensor.shape[1:]] if name in ROWS else list(tensor.shape)
        begin, end = end, end + torch.Size(shape).numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in sorted(tensors):
            for block in _blocks(tensors[name]):
                _write(file, block)
            for source in range(1, peers.size) if name in ROWS else ():
                rows = peers.bounds[source + 1] - peers.bounds[source]
                for block in _blocks(tensors[name].new_empty(rows, *tensors[name].shape[1:], device="meta")):
                    came = torch.empty_like(block, device=tensors[name].device)
                    dist.recv(came, group=peers.group, group_src=source)
                    _write(file, came)


def send_rows(tensors: dict[str, Tensor], peers: LatentPeers) -> None:
    """Send this rank's rows to the first rank of ``peers``, which is in :func:`receive_file`."""
    for name in sorted(tensors):
        for block in _blocks(tensors[name]) if name in ROWS else ():
            dist.send(block.contiguous(), group=peers.group, group_dst=0)


def _blocks(tensor: Tensor) -> Iterator[Tensor]:
    """Of at most BLOCK_BYTES, or a row."""
    row = max(1, tensor[:1].numel() * tensor.element_size())
    yield from tensor.split(max(1, BLOCK_BYTES // row))


def _write(file: BinaryIO, block: Tensor) -> None:
    file.write(block.cpu().contiguous().view(torch.uint8).numpy().data)
