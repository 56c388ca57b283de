"""The cases of ``fastsae bench`` under pytest-benchmark: ``pytest benchmarks``, also with --benchmark-compare.

Shapes from the environment, as ``--shapes`` takes them: ``FASTSAE_BENCH_SHAPES=C1 pytest benchmarks``; by default
the tiny one. On a GPU a call lasts until the device is done.
"""

import functools
import os

import pytest
import torch

from fastsae import ops
from fastsae.bench.cases import contestants
from fastsae.bench.problem import Problem, make_problem
from fastsae.bench.shapes import OPS, Shape, parse_shapes
from fastsae.bench.truth import judge

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
SHAPES = parse_shapes(os.environ.get("FASTSAE_BENCH_SHAPES", "tiny"))
OURS = ops.resolve("auto", DEVICE)


def names(op: str) -> list[str]:
    """The contestants of an operation."""
    ours = ["triton fused", "triton chunked"] if (op, OURS) == ("encode", "triton") else [OURS]
    return [*ours, "torch"]


@functools.lru_cache(maxsize=1)
def problem(shape: Shape) -> Problem:
    return make_problem(shape, DTYPE, DEVICE)


@pytest.mark.parametrize(("op", "name"), [(op, name) for op in OPS for name in names(op)])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@torch.no_grad()
def test_kernel(benchmark, shape, op, name):
    p = problem(shape)
    calls = contestants(op, p, [OURS, "torch"])
    run = calls[name]()
    by_torch = None if name == "torch" else judge(op, p, calls["torch"]()())
    assert judge(op, p, run(), by_torch).difference is None  # never a speed on a red gate

    def call():
        run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    cost = OPS[op].cost(shape, DTYPE.itemsize)
    benchmark.extra_info.update(flops=cost.flops, bytes=cost.bytes, dtype=str(DTYPE), device=str(DEVICE))
    benchmark.group = f"{shape.name} {op}"
    benchmark(call)
