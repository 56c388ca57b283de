"""How fast a run goes: from what ``fastsae bench`` measured, never from guesses.

Shapes: N tokens of a batch, D width, L latents, K active latents.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ..bench.shapes import OPS, Shape
from ..errors import ArtifactError
from .memory import Situation
from .result import Speed

OP = "fwd+bwd"

FAR = 4.0
"""How many times larger or smaller a shape may be and still tell how long another takes."""


def speed_from_bench(path: str, s: Situation) -> Speed:
    """From the file that ``fastsae bench --json FILE`` wrote on the device that will train.

    A coder's step takes what forward and backward of the nearest shape took there, scaled by the least time that
    either could take, and its optimizer reads and writes its numbers at the measured bandwidth; the model's forward
    takes its operations at the measured peak. Raises :class:`ArtifactError` for another file.
    """
    record = _read(path)
    peaks, device = record["peaks"], record["device"]["name"]
    cases = [case for case in record["cases"] if case["op"] == OP and case["ms"] and _is_of(case, s)]
    if not cases:
        raise ArtifactError(
            f"bench: expected {OP!r} timed with {s.work.implementation} in {path}, got none; measure it where the run "
            f"will be: fastsae bench --implementation {s.work.implementation} --json {path}"
        )
    batch = s.cfg.batch_size * s.tokens
    seconds = batch / s.tokens * s.structure.forward.flops / peaks["gemm_flops"]
    for name, latents in s.layout.heaviest.items():
        spec = s.specs[name]
        shape = Shape(name, batch * s.layout.joined, (spec.d_in + spec.d_out) // 2, latents, spec.sae.k)
        near = min(cases, key=lambda case: _distance(case["shape"], shape))
        if _distance(near["shape"], shape) > FAR:
            sizes = f"{shape.N},{shape.D},{shape.L},{shape.k}"
            raise ArtifactError(
                f"bench: expected a shape near N,D,L,k = {sizes} in {path}, of {name}, got {near['shape']['name']} as "
                f"the nearest; measure it where the run will be: fastsae bench --shapes {sizes} --json {path}"
            )
        bounds = [_bound(each, s.work.dtype.itemsize, peaks) for each in (shape, _shape(near))]
        seconds += near["ms"] / 1e3 * bounds[0] / bounds[1]
    kept = [s.coder_bytes(name, latents) for name, latents in s.layout.heaviest.items()]
    seconds += 2 * sum(k.weights + k.optimizer for k in kept) / peaks["copy_bytes"] / s.cfg.grad_acc_steps
    return Speed(batch / seconds, f"{Path(path).name}, {device}")


def _read(path: str) -> dict[str, Any]:
    try:
        record = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
        if not {"cases", "peaks", "device"} <= record.keys():
            raise ValueError("it has no cases, peaks and device")
        return record
    except (OSError, ValueError, AttributeError) as error:
        raise ArtifactError(
            f"bench: expected a file that fastsae bench --json FILE wrote, got {path}: {error}"
        ) from None


def _is_of(case: dict[str, Any], s: Situation) -> bool:
    return case["implementation"].split()[0] == s.work.implementation


def _shape(case: dict[str, Any]) -> Shape:
    return Shape(**case["shape"])


def _distance(case: dict[str, Any], shape: Shape) -> float:
    """Between two shapes: how many times larger one is, in the size where they differ most."""
    return max(math.exp(abs(math.log(case[size] / getattr(shape, size)))) for size in ("N", "D", "L", "k"))


def _bound(shape: Shape, itemsize: int, peaks: dict[str, Any]) -> float:
    return OPS[OP].cost(shape, itemsize).bound_ms(peaks["gemm_flops"], peaks["copy_bytes"])
