"""Activations to train on: sums of a few directions of a known dictionary, and those of the embedded model.

Shapes: N tokens of a batch, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def synthetic(N: int, D: int, steps: int, seed: int, device: str, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """``steps`` batches [N, D] and held-out tokens [4096, D], all different.

    A token is the sum of 20 of 8·D fixed directions, some far more frequent than others, at uniform strength, plus
    noise and a mean that is not 0.
    """
    gen = torch.Generator(device).manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(8 * D, D, generator=gen, device=device), dim=1)
    mean = torch.randn(D, generator=gen, device=device)

    def batch(n: int) -> Tensor:
        chosen = (torch.rand(n, 20, generator=gen, device=device) ** 3 * len(directions)).long()
        strength = 3 * torch.rand(n, 20, generator=gen, device=device)
        signal = torch.nn.functional.embedding_bag(chosen, directions, per_sample_weights=strength, mode="sum")
        return (signal + mean + 0.03 * torch.randn(n, D, generator=gen, device=device)).to(dtype)

    return [batch(N) for _ in range(steps)], batch(4096)


def embedded(
    N: int, steps: int, seed: int, device: str, dtype: torch.dtype, hookpoint: str
) -> tuple[list[Tensor], Tensor]:
    """The same of the embedded model's activations at ``hookpoint``, tokens shuffled."""
    from fastsae import RunConfig, load_model, load_tokenizer, load_tokens
    from fastsae.hooks import run_hooked

    run = RunConfig(ctx_len=256, max_tokens=(steps * N + 4096) * 5 // 4 + 512, device=device)
    model = load_model("demo", run)
    rows = load_tokens("stdlib", run, load_tokenizer("demo", run), model.config)
    seen: list[Tensor] = []
    for i in range(0, len(rows), 16):
        ids = torch.stack([torch.as_tensor(rows[j]["input_ids"]) for j in range(i, min(i + 16, len(rows)))])
        run_hooked(
            model, ids.to(device), {hookpoint: 1}, lambda _name, _x, output: seen.append(output.flatten(0, 1).cpu())
        )
    tokens = torch.cat(seen)
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))
    needed = steps * N + 4096
    if len(tokens) < needed:
        raise SystemExit(f"expected {needed} tokens of the embedded text, got {len(tokens)}; lower --steps")
    tokens = tokens[order[:needed]].to(device, dtype)
    return list(tokens[: steps * N].split(N)), tokens[steps * N :]
