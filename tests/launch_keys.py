"""What Triton would compile for each launch, without a GPU and without compiling: a script for :mod:`test_recompile`.

Every launcher of ``fastsae_kernels`` is called with batches of several sizes on a pretended H100. Triton's own launch
machinery binds and specialises the arguments; a hook takes down the key it would compile under, and stops it there.
Prints one JSON object: ``{launcher: {number of tokens: [kernel and key, ...]}}``. ``TRITON_INTERPRET`` must be unset.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from types import SimpleNamespace

import torch
import triton
from fastsae_kernels import Adam, Coder, Loss, Rows, RowStep, coder_step, gpu, launch, row_update
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

TOKENS = (1, 2, 15, 16, 17, 4096, 2**20)
D, L, K = 16, 128, 4

decode_module = import_module("fastsae_kernels.decode")
backward = import_module("fastsae_kernels.backward")


@triton.jit
def _specialised_kernel(x_ptr, N):
    """A kernel whose author forgot ``do_not_specialize``: the check below must see it."""


def launchers() -> dict[str, Callable[[int], object]]:
    """Calls by name, each with so many tokens."""
    weight, bias, allowed = torch.ones(L, D), torch.ones(L), torch.ones(L, dtype=torch.bool)

    def x(N: int) -> torch.Tensor:
        return torch.ones(N, D)

    def code(N: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ones(N, K), torch.arange(K).expand(N, K).contiguous()

    def step(N: int, number: int) -> None:
        matrices = Rows(weight, rule.new_state(weight)), Rows(weight.clone(), rule.new_state(weight), unit_rows=True)
        coder = Coder(matrices[0].weight, bias, matrices[1].weight, bias[:D])
        coder_step(x(N), x(N), coder, Loss(torch.ones(())), RowStep(rule, 0.1, number, *matrices), k=K)

    rule = Adam()
    return {
        "encode fused": lambda N: launch.encode(x(N), weight, bias, K, path="fused"),
        "encode fused 16 bit": lambda N: launch.encode(x(N).bfloat16(), weight, bias, K, path="fused"),
        "encode fused masked": lambda N: launch.encode(x(N), weight, bias, K, "topk", allowed, path="fused"),
        "encode chunked": lambda N: launch.encode(x(N), weight, bias, K, path="chunked"),
        "groupmax fused": lambda N: launch.encode(x(N), weight, bias, K, "groupmax", path="fused"),
        "groupmax chunked": lambda N: launch.encode(x(N), weight, bias, K, "groupmax", path="chunked"),
        "select": lambda N: launch.select(torch.ones(min(N, 2**14), L), K),
        "decode": lambda N: launch.decode(*code(N), weight, bias[:D]),
        "decode residual": lambda N: decode_module.decode_residual(*code(N), weight, None, x(N), torch.float32),
        "decode multi": lambda N: decode_module.decode_residual(*code(N), weight, None, x(N), torch.float32, first_k=1),
        "act_grad": lambda N: launch.act_grad(x(N), code(N)[1], weight),
        "decode_backward": lambda N: launch.decode_backward(x(N), *code(N), weight),
        "encode_backward": lambda N: launch.encode_backward(*code(N), x(N), L),
        "coder_backward": lambda N: backward.coder_backward(x(N), *code(N), x(N), weight),
        "coder_step": lambda N: step(N, number=N),
        "row_update": lambda N: row_update.update(rule, Rows(weight, rule.new_state(weight)), weight, lr=N / 3, step=N),
        "forgotten": lambda N: _specialised_kernel[(1,)](bias, N),
    }


def main() -> None:
    driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: 0,
            get_current_stream=lambda _: 0,
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
        )  # pyright: ignore[reportArgumentType]
    )
    gpu.gpu_family = lambda _: "sm_90"
    seen: list[str] = []

    def take_down(*, key, fn, **_) -> bool:
        seen.append(f"{fn.name} {key}")
        return True

    triton.knobs.runtime.jit_cache_hook = take_down
    keys: dict[str, dict[int, list[str]]] = {}
    for name, call in launchers().items():
        for N in TOKENS:
            seen.clear()
            call(N)
            keys.setdefault(name, {})[N] = sorted(set(seen))
    print(json.dumps(keys))


if __name__ == "__main__":
    main()
