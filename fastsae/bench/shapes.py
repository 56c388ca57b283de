"""What ``fastsae bench`` measures: shapes, operations, and what each costs at least.

Shapes: N tokens, D width, L latents, K active latents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ..errors import ConfigError
from ..fields import check_types

IMPLEMENTATIONS = ("auto", "triton", "cpu", "reference", "torch")


@dataclass(frozen=True)
class BenchConfig:
    """What to measure; everything measured goes to --json."""

    shapes: str | None = None
    """Names (S1,S2,S3 for GPUs; C1,C2 for CPUs; tiny) or N,D,L,k; several split by ';'. By default the device's own."""

    quick: bool = False
    """A few seconds: the tiny shape unless --shapes is given, few repetitions."""

    device: str | None = None
    """cuda, cuda:1 or cpu; by default cuda where there is one."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of tokens and weights; auto is bfloat16 on a GPU, float32 on a CPU."""

    implementation: str = "auto"
    """What to compare with plain torch: auto, triton, cpu, reference, torch; several split by ','."""

    json: str | None = None
    """Also write settings, versions and every time measured to this file; - for stdout."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in self.implementations():
            if name not in IMPLEMENTATIONS:
                raise ConfigError(f"implementation: expected some of {', '.join(IMPLEMENTATIONS)}, got {name!r}")

    def implementations(self) -> list[str]:
        return [name.strip() for name in self.implementation.split(",")]

    def shapes_for(self, device_type: str) -> list[Shape]:
        """The shapes asked for, or those that suit a device of that type."""
        if self.shapes is not None:
            return parse_shapes(self.shapes)
        names = ("tiny",) if self.quick else ("S1", "S2", "S3") if device_type == "cuda" else ("C1", "C2")
        return [SHAPES[name] for name in names]


# ---- shapes ------------------------------------------------------------------------------------------


class Shape(NamedTuple):
    """One problem size."""

    name: str
    N: int
    D: int
    L: int
    k: int

    def __str__(self) -> str:
        return f"{self.name}: N={self.N} D={self.D} L={self.L} k={self.k}"


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("S1", 8192, 768, 24576, 32),  # GPT-2's width
        Shape("S2", 8192, 4096, 131072, 64),  # an 8B model's width
        Shape("S3", 16384, 2048, 65536, 64),  # a 1B model's width
        Shape("C1", 2048, 768, 12288, 32),  # for CPUs
        Shape("C2", 1024, 768, 24576, 32),
        Shape("tiny", 256, 64, 1024, 8),  # to see that everything runs
    )
}


def parse_shapes(text: str) -> list[Shape]:
    """``"S1,S2"``, ``"1024,512,8192,16"``, or several of either split by ``;``; raises :class:`ConfigError`."""
    shapes = []
    for part in filter(None, (part.strip() for part in text.split(";"))):
        words = [word.strip() for word in part.split(",")]
        if all(word in SHAPES for word in words):
            shapes += [SHAPES[word] for word in words]
        elif len(words) == 4 and all(word.isdecimal() for word in words):
            N, D, L, k = map(int, words)
            if min(N, D, L, k) < 1 or k > L:
                raise ConfigError(f"shapes: expected positive N,D,L,k with k <= L, got {part!r}")
            shapes.append(Shape("x".join(words), N, D, L, k))
        else:
            names = ", ".join(SHAPES)
            raise ConfigError(
                f"shapes: expected names ({names}) or N,D,L,k split by ';', got {part!r}; try --shapes C1"
            )
    if not shapes:
        raise ConfigError(f"shapes: expected at least one shape, got {text!r}; try --shapes C1")
    return shapes


# ---- operations and their costs ----------------------------------------------------------------------


class Cost(NamedTuple):
    """What an operation cannot do without: arithmetic, and each byte of its inputs and outputs moved once."""

    flops: int
    bytes: int

    def bound_ms(self, peak_flops: float, bandwidth: float) -> float:
        """Time at the measured peak plus time at the measured bandwidth, one after the other."""
        return 1e3 * (self.flops / peak_flops + self.bytes / bandwidth)


ACT, INDEX = 4, 8  # bytes: activations are float32, indices int64


def _encode(s: Shape, size: int) -> Cost:
    # one dot product of length D per token and latent; tokens, weights, bias in; activations and indices out
    return Cost(2 * s.N * s.D * s.L, size * (s.N * s.D + s.L * s.D + s.L) + s.N * s.k * (ACT + INDEX))


def _topk(s: Shape, size: int) -> Cost:
    # comparisons only; every score in, indices out
    return Cost(0, size * s.N * s.L + INDEX * s.N * s.k)


def _decode(s: Shape, size: int) -> Cost:
    # k scaled rows per token; activations, indices and the rows they can reach in; tokens out
    return Cost(2 * s.N * s.k * s.D, s.N * s.k * (ACT + INDEX) + size * (_rows(s) * s.D + s.N * s.D))


def _decode_backward(s: Shape, size: int) -> Cost:
    # per slot a dot product (d_acts) and a scaled row (dW_dec); decode's inputs and d_out in; both gradients out
    inputs = s.N * s.k * (ACT + INDEX) + size * (_rows(s) * s.D + s.N * s.D)
    return Cost(4 * s.N * s.k * s.D, inputs + s.N * s.k * ACT + size * s.L * s.D)


def _encode_backward(s: Shape, size: int) -> Cost:
    # per slot a scaled row (dW_enc) and an addition (db_enc); d_acts, indices, tokens in; both gradients out
    flops = 2 * s.N * s.k * s.D + s.N * s.k
    return Cost(flops, s.N * s.k * (ACT + INDEX) + size * (s.N * s.D + s.L * s.D + s.L))


def _forward_backward(s: Shape, size: int) -> Cost:
    # the four above, one after the other; the gradient of b_dec is left out
    parts = [op(s, size) for op in (_encode, _decode, _decode_backward, _encode_backward)]
    return Cost(sum(part.flops for part in parts), sum(part.bytes for part in parts))


def _rows(s: Shape) -> int:
    return min(s.L, s.N * s.k)


class Op(NamedTuple):
    """An operation: its cost by shape and bytes per element, and the unit its speed is read in."""

    cost: Callable[[Shape, int], Cost]
    unit: str


OPS: dict[str, Op] = {
    "encode": Op(_encode, "TFLOP/s"),
    "topk": Op(_topk, "GB/s"),
    "decode": Op(_decode, "GB/s"),
    "decode bwd": Op(_decode_backward, "GB/s"),
    "encode bwd": Op(_encode_backward, "GB/s"),
    "fwd+bwd": Op(_forward_backward, "TFLOP/s"),
}
