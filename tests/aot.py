"""Compile Triton kernels for GPUs that are not there, and read registers, spills, memory and instructions.

As a script (``python tests/aot.py sm_90 gfx942``) it compiles every case of :mod:`aot_cases` for those targets
and prints one JSON object per kernel. ``TRITON_INTERPRET`` must be unset: Triton reads it when kernels are
defined, which is why the tests run this file in a process of its own.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942")


@dataclass(frozen=True)
class Case:
    """One kernel with one shipped config."""

    name: str
    """Says kernel, shape and dtype; unique per target."""

    kernel: Any
    """The ``triton.jit`` function."""

    types: dict[str, str]
    """Runtime arguments by name: ``"*bf16"``, ``"i32"``, ``"fp32"``, ``"tensordesc<bf16[128,64]>"``, ..."""

    constexprs: dict[str, Any]
    """``tl.constexpr`` arguments by name."""

    options: dict[str, int]
    """``num_warps``, ``num_stages``."""

    unaligned: frozenset[str] = field(default_factory=frozenset)
    """Runtime arguments not known to be divisible by 16 at run time; all other pointers and integers are."""


def gpu_target(name: str):
    """Triton's target object of ``"sm_90"`` or ``"gfx942"``."""
    from triton.backends.compiler import GPUTarget

    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name[3:]), 32)
    return GPUTarget("hip", name, 64)


def compile_case(case: Case, target: str):
    """Triton's compiled kernel of ``case``."""
    import triton
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    unknown = (case.types.keys() | case.constexprs.keys()) ^ set(names)
    if unknown:
        raise ValueError(f"{case.name}: arguments do not match the kernel's: {sorted(unknown)}")
    aligned = [n for n in names if case.types.get(n, "").startswith(("*", "i")) and n not in case.unaligned]
    source = ASTSource(
        fn=case.kernel,
        signature={n: case.types.get(n, "constexpr") for n in names},
        constexprs=dict(case.constexprs),
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    return triton.compile(source, target=gpu_target(target), options={"enable_fp_fusion": True, **case.options})


def report(compiled) -> dict[str, Any]:
    """What the machine code uses: registers, spills, shared memory in bytes, and counts of telling instructions."""
    usage = _amd_report(compiled.asm["amdgcn"]) if "amdgcn" in compiled.asm else _nvidia_report(compiled.asm)
    return {"shared": compiled.metadata.shared, **usage}


def _amd_report(assembly: str) -> dict[str, Any]:
    def number(key: str) -> int:
        return max((int(n) for n in re.findall(rf"\.{key}:\s+(\d+)", assembly)), default=0)

    return {
        "registers": number("vgpr_count"),
        "spills": number("vgpr_spill_count"),
        "mma": len(re.findall(r"v_mfma", assembly)),
        "loads_128": len(re.findall(r"(?:global|buffer)_load_dwordx4", assembly)),
        "shuffles": len(re.findall(r"^\s+(?:ds_bpermute|ds_swizzle|v_permlane|\w+_dpp)", assembly, re.M)),
        "barriers": len(re.findall(r"^\s+s_barrier", assembly, re.M)),
        "float_atomics": len(re.findall(r"(?:global|buffer)_atomic_\w*add_f", assembly)),
        "instructions": len(re.findall(r"^\s+[sv]_\w+|^\s+(?:ds|global|buffer)_\w+", assembly, re.M)),
    }


def _nvidia_report(asm) -> dict[str, Any]:
    binaries = _nvidia_binaries()
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(asm["cubin"])
        usage = _output(binaries / "cuobjdump", "--dump-resource-usage", cubin)
        sass = _output(binaries / "nvdisasm", "-c", cubin)
    registers = re.search(r"REG:(\d+)", usage)
    if registers is None:
        raise RuntimeError(f"cuobjdump gave no resource usage: {usage[:200]!r}")

    def count(pattern: str) -> int:
        return len(re.findall(pattern, sass))

    return {
        "registers": int(registers[1]),
        "spills": count(r"\bSTL\b") + count(r"\bSTL\."),
        "mma": count(r"\b(?:HGMMA|HMMA|UTCHMMA)\b"),
        "wgmma": count(r"\bHGMMA\b"),
        "async_copies": count(r"\bLDGSTS\b") + count(r"\bUTMALDG\b"),
        "loads_128": count(r"\bLDG\.E[\w.]*128"),
        "loads": count(r"\bLDG\b"),
        "shuffles": count(r"\bSHFL\b"),
        "barriers": count(r"\bBAR\b"),
        "float_atomics": count(r"\b(?:ATOMG?|RED[G]?)\.[\w.]*F(?:32|16)"),
        "instructions": count(r"/\*[0-9a-f]{4,}\*/\s+\S"),
    }


def _nvidia_binaries() -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def _output(*command: Any) -> str:
    return subprocess.run([str(c) for c in command], check=True, capture_output=True, text=True).stdout


def main(targets: list[str], match: str = "") -> None:
    """Compile the cases of ``targets`` whose name contains ``match``; one line of JSON each, errors included."""
    import aot_cases

    for target in targets:
        for case in aot_cases.cases(target):
            if match not in case.name:
                continue
            start = time.perf_counter()
            try:
                result = report(compile_case(case, target))
            except Exception as error:
                result = {"error": f"{type(error).__name__}: {error}"[:2000]}
            result = {"target": target, "case": case.name, **result, "seconds": round(time.perf_counter() - start, 1)}
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET"):
        sys.exit("aot.py: unset TRITON_INTERPRET; the interpreter's kernels cannot be compiled")
    main(
        [a for a in sys.argv[1:] if a in TARGETS] or list(TARGETS), "".join(a for a in sys.argv[1:] if a not in TARGETS)
    )
