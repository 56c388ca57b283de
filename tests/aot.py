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
    """What the machine code uses: registers, spills, shared memory in bytes, and counts of telling instructions.

    NVIDIA's instructions are counted in PTX: each of the counted ones is one instruction of the machine, too.
    """
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
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(asm["cubin"])
        usage = _output("cuobjdump", "--dump-resource-usage", cubin)
        found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        if found is None:
            raise RuntimeError(f"cuobjdump gave no resource usage: {usage[:200]!r}")
        # without a stack nothing can be spilled, which saves disassembling; some have one that nothing is stored to
        spills = len(re.findall(r"\bSTL\b", _output("nvdisasm", "-c", cubin))) if int(found[2]) else 0
    ptx = asm["ptx"]

    def count(pattern: str) -> int:
        return len(re.findall(pattern, ptx))

    return {
        "registers": int(found[1]),
        "spills": spills,
        "mma": count(r"\b(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)\b"),
        "wgmma": count(r"\bwgmma\.mma_async\b"),
        "async_copies": count(r"\bcp\.async\.(?:c[ag]|bulk\.tensor)\b"),
        "loads_128": count(r"\bld\.global[\w.:]*\.(?:v4\.[bf]32|v2\.[bf]64)\b"),
        "shuffles": count(r"\b(?:shfl|redux)\.sync\b"),
        "barriers": count(r"\b(?:bar|barrier)\.sync\b"),
        "float_atomics": count(r"\b(?:atom|red)\.[\w.:]*add[\w.:]*\.b?f(?:16|32|64)"),
        "instructions": count(r";\n"),
    }


def _output(tool: str, *arguments: Any) -> str:
    """What one of the tools that come with Triton says."""
    import triton

    binary = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    return subprocess.run([binary, *arguments], check=True, capture_output=True, text=True).stdout


def main(targets: list[str], match: str = "") -> None:
    """Compile the cases of ``targets`` whose name contains ``match``; one line of JSON each, errors included."""
    import aot_cases
    import triton

    for target in targets:
        for case in aot_cases.cases(target):
            if match not in case.name:
                continue
            start = time.perf_counter()
            try:
                result = report(compile_case(case, target))
            except Exception as error:
                result = {"error": f"{type(error).__name__}: {error}"[:2000]}
            seconds = round(time.perf_counter() - start, 1)
            line = {"triton": triton.__version__, "target": target, "case": case.name, **result, "seconds": seconds}
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET"):
        sys.exit("aot.py: unset TRITON_INTERPRET; the interpreter's kernels cannot be compiled")
    main(
        [a for a in sys.argv[1:] if a in TARGETS] or list(TARGETS), "".join(a for a in sys.argv[1:] if a not in TARGETS)
    )
