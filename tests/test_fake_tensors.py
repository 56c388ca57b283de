"""Coders under FakeTensor, which nnsight and torch.compile run modules on: shapes and dtypes, and no look at a value.

In a file of its own: importing nnsight 0.3.7 breaks FakeTensor on torch 2.14 for the whole process.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastsae import FastSae, SaeConfig

D, L, K = 16, 48, 4


@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_encode_decode_and_forward_under_fake_tensors(implementation):
    with FakeTensorMode():
        sae = FastSae(D, SaeConfig(num_latents=L, k=K, skip_connection=True), implementation=implementation)
        x = torch.empty(5, 7, D)
        acts, indices, _ = sae.encode(x)
        assert (acts.shape, indices.shape, indices.dtype) == ((5, 7, K), (5, 7, K), torch.int64)
        assert sae.decode(acts, indices).shape == (5, 7, D)
        out = sae(x, dead_mask=torch.zeros(L, dtype=torch.bool))
        assert (out.sae_out.shape, out.fvu.shape) == ((5, 7, D), ())
