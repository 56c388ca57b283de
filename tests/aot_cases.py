"""The kernels with the configs that ship, as cases for :mod:`aot`: what to compile for each target.

A kernel joins by a function ``target -> list[Case]`` in ``KERNELS``; sizes come from the configs, so that what is
compiled here is what runs. Shapes S1 and S2 are those of the benchmark.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace

import torch
from aot import Case
from aot_sparse_cases import act_grad_cases, decode_cases, latent_grad_cases
from aot_step_cases import center_cases, latent_step_cases, row_update_cases
from fastsae_kernels import configs, fused_product, groupmax

select_module = importlib.import_module("fastsae_kernels.select")
resolve_module = importlib.import_module("fastsae_kernels.resolve")

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
S1 = {"D": 768, "L": 24576, "k": 32}
S2 = {"D": 4096, "L": 131072, "k": 64}


def encode_cases(target: str) -> list[Case]:
    """The fused product with group maxima."""

    def case(name: str, shape: dict[str, int], dtype: torch.dtype, **changes: bool) -> Case:
        D, L = shape["D"], shape["L"]
        config = replace(configs.default_encode(D, L, dtype, target), **changes)
        x = weight = f"*{NAMES[dtype]}"
        if config.descriptors:
            x = f"tensordesc<{NAMES[dtype]}[{config.BLOCK_N}, {config.BLOCK_D}]>"
            weight = f"tensordesc<{NAMES[dtype]}[{config.BLOCK_L}, {config.BLOCK_D}]>"
        return Case(
            name=f"encode {name} {NAMES[dtype]}",
            kernel=fused_product._encode_kernel,
            types={"x_ptr": x, "weight_ptr": weight, "bias_ptr": "*fp32", "maxima_ptr": "*i32"}
            | {"N": "i32", "D": "i32", "L": "i32"},
            constexprs={"mask_ptr": None}
            | fused_product.maxima_constexprs(D, L, dtype, config, has_mask=False, descriptors=config.descriptors),
            options={"num_warps": config.num_warps, "num_stages": config.num_stages},
            unaligned=frozenset({"N"}),
        )

    found = [case("S1", S1, torch.bfloat16), case("S2", S2, torch.float16), case("S1", S1, torch.float32)]
    if configs.default_encode(S2["D"], S2["L"], torch.bfloat16, target).descriptors:
        found.append(case("S2 pointers", S2, torch.bfloat16, descriptors=False))  # where addresses forbid descriptors
    return found


def resolve_cases(target: str) -> list[Case]:
    """The top k from group maxima."""

    def case(name: str, shape: dict[str, int], dtype: torch.dtype) -> Case:
        D, L, k = shape["D"], shape["L"], shape["k"]
        config = configs.default_encode(D, L, dtype, target)
        rows = configs.resolve_config(config.num_groups(L), k, config.GROUP, target)
        x = f"*{NAMES[dtype]}"
        return Case(
            name=f"resolve {name} {NAMES[dtype]}",
            kernel=resolve_module._resolve_kernel,
            types={"x_ptr": x, "weight_ptr": x, "bias_ptr": "*fp32", "maxima_ptr": "*i32", "list_ptr": "*i64"}
            | {"acts_ptr": "*fp32", "indices_ptr": "*i64", "D": "i32", "L": "i32", "num_groups": "i32"},
            constexprs={"mask_ptr": None} | resolve_module.resolve_constexprs(L, k, config, rows, has_mask=False),
            options={"num_warps": rows.num_warps},
        )

    group = configs.default_encode(4096, 2**19, torch.bfloat16, target).GROUP
    return [
        case("S1", S1, torch.bfloat16),
        case("S2", S2, torch.bfloat16),
        case("k=512", S2 | {"k": 512}, torch.float32),
        case("widest", {"D": 4096, "L": configs.MAX_GROUPS * group, "k": configs.MAX_FUSED_K}, torch.bfloat16),
    ]


def select_cases(target: str) -> list[Case]:
    """The top k from stored float32 scores."""

    def case(name: str, shape: dict[str, int]) -> Case:
        config = configs.default_select(shape["L"], shape["k"], target)
        return Case(
            name=f"select {name} fp32",
            kernel=select_module._select_kernel,
            types={"scores_ptr": "*fp32", "bias_ptr": "*fp32", "list_ptr": "*i64", "acts_ptr": "*fp32"}
            | {"indices_ptr": "*i64", "L": "i32", "GROUP": "i32"},
            constexprs={"mask_ptr": None}
            | select_module.select_constexprs(shape["k"], config, has_bias=True, has_mask=False),
            options={"num_warps": config.num_warps},
            unaligned=frozenset({"GROUP"}),
        )

    large = [case(f"k={k}", S2 | {"k": k}) for k in (512, configs.MAX_SELECT_K)]
    return [case("S1", S1), case("S2", S2), *large]


def groupmax_cases(target: str) -> list[Case]:
    """The largest of each group, fused."""
    D, k = S1["D"], S1["k"]
    config = configs.default_groupmax(torch.bfloat16, target)
    return [
        Case(
            name="groupmax S1 bf16",
            kernel=groupmax._groupmax_encode_kernel,
            types={"x_ptr": "*bf16", "weight_ptr": "*bf16", "bias_ptr": "*fp32", "acts_ptr": "*fp32"}
            | {"indices_ptr": "*i64", "N": "i32", "D": "i32", "L": "i32", "GROUP_SIZE": "i32"},
            constexprs={"mask_ptr": None} | groupmax.groupmax_constexprs(D, k, torch.bfloat16, config, has_mask=False),
            options={"num_warps": config.num_warps, "num_stages": config.num_stages},
            unaligned=frozenset({"N"}),
        )
    ]


KERNELS: tuple[Callable[[str], list[Case]], ...] = (
    encode_cases,
    resolve_cases,
    select_cases,
    groupmax_cases,
    decode_cases,
    act_grad_cases,
    latent_grad_cases,
    row_update_cases,
    latent_step_cases,
    center_cases,
)


def cases(target: str) -> list[Case]:
    """Everything to compile for ``target``."""
    return [case for kernel in KERNELS for case in kernel(target)]
