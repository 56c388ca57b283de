"""Every shipped config, compiled for GPUs that need not be there: registers, spills, memory, instructions.

`aot.py` compiles in processes of its own, one half of the targets each, for the interpreter must be off there. Where
``FASTSAE_TRITON`` names a folder, they take the Triton that lies in it: ``make compile TRITON=3.6.0``.
The tables of registers are what a Triton gave, rounded up: a change that needs more should be seen.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is for Linux")

TESTS = Path(__file__).parent
OTHER_TRITON = os.environ.get("FASTSAE_TRITON")
HALVES = (("sm_80", "sm_89", "gfx942"), ("sm_90", "sm_100"))  # of about equal time
TARGETS = [target for half in HALVES for target in half]

SHARED_BYTES = {
    "sm_80": 163 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "gfx942": 64 * 1024,
}

MAX_REGISTERS = {
    "3.9": {
        "encode": 256,
        "groupmax": 256,
        "resolve": 160,
        "select S": 168,
        "select k": 256,
        "decode": 208,
        "act_grad": 80,
        "latent_grad": 160,
        "row_update": 120,
        "latent_step": 208,
        "center": 64,
    },
    "3.6": {
        "encode": 256,
        "groupmax": 256,
        "resolve": 160,
        "select S": 208,
        "select k": 256,
        "decode": 208,
        "act_grad": 80,
        "latent_grad": 160,
        "row_update": 120,
        "latent_step": 208,
        "center": 64,
    },
}
"""Per thread, by Triton and beginning of a case's name; the largest over targets and cases."""
KERNELS = MAX_REGISTERS["3.9"]


MAX_SPILLS = {
    "3.9": {"latent_step adam 1024 bf16": 2},
    "3.6": {
        "latent_step adam 768 bf16": 11,
        "latent_step adam 1024 bf16": 17,
        "latent_step adam 2048 bf16": 4,
        "latent_step adam 8192 bf16": 2,
    },
}
"""Stores of a register to memory, by Triton and case on sm_90, where an H200 was faster with them: the programs
that fit beside each other outweigh them (``benchmarks/results/latent-step-h200-2026-11-27.txt``). At 8192 columns a
thread has all the registers that its program's size leaves it. Elsewhere none."""


@pytest.fixture(scope="module")
def reports() -> dict[tuple[str, str], dict]:
    """What every case needs on every target."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if OTHER_TRITON:
        environment["PYTHONPATH"] = os.pathsep.join([OTHER_TRITON, os.environ.get("PYTHONPATH", "")])
    running = [
        subprocess.Popen(
            [sys.executable, TESTS / "aot.py", *half], env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for half in HALVES
    ]  # fmt: skip
    finished = [process.communicate(timeout=900) for process in running]
    for process, (_, errors) in zip(running, finished, strict=True):
        assert process.returncode == 0, errors
    lines = [json.loads(line) for output, _ in finished for line in output.splitlines()]
    if OTHER_TRITON:
        for line in lines:
            assert Path(OTHER_TRITON, f"triton-{line['triton']}.dist-info").exists(), "compiled with another Triton"
    return {(line["target"], line["case"]): line for line in lines}


def of(reports, target: str, kernel: str = "") -> dict[str, dict]:
    """The reports of one target's cases of one kernel; never empty."""
    found = {case: r for (t, case), r in reports.items() if t == target and case.startswith(kernel)}
    assert found, f"no case of {kernel!r} for {target}"
    return found


@pytest.mark.parametrize("target", TARGETS)
def test_every_config_compiles_within_its_gpu(reports, target):
    for case, report in of(reports, target).items():
        assert "error" not in report, f"{case}: {report['error']}"
        allowed = MAX_SPILLS.get(report["triton"].rsplit(".", 1)[0], {}) if target == "sm_90" else {}
        assert report["spills"] <= allowed.get(case, 0), f"{case}: {report['spills']} spills"
        assert report["shared"] <= SHARED_BYTES[target], f"{case}: {report['shared']} bytes of shared memory"
        assert report["float_atomics"] == 0, f"{case}: float atomics are not deterministic"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_registers_stay_within_the_table(reports, target, kernel):
    for case, report in of(reports, target, kernel).items():
        table = MAX_REGISTERS.get(report["triton"].rsplit(".", 1)[0])
        if table is None:
            pytest.skip(f"no table for Triton {report['triton']}; every other test of this file holds for it")
        assert report["registers"] <= table[kernel], f"{case}: {report['registers']} registers"


def test_every_case_has_a_row_in_the_tables(reports):
    assert all(table.keys() == KERNELS.keys() for table in MAX_REGISTERS.values())
    for _, case in reports:
        assert sum(case.startswith(kernel) for kernel in KERNELS) == 1, case
    assert {case.split()[0] for _, case in reports} == {kernel.split()[0] for kernel in KERNELS}


@pytest.mark.parametrize("target", TARGETS)
def test_sixteen_bit_products_run_on_matrix_units(reports, target):
    for case, report in (of(reports, target, "encode") | of(reports, target, "groupmax")).items():
        if case.endswith("fp32") and target != "gfx942":
            assert report["mma"] == 0, f"{case}: float32 must not be rounded for a matrix unit"
        else:
            assert report["mma"] > 0, case
        if target == "sm_90" and not case.endswith("fp32"):
            assert report["wgmma"] > 0, case


@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_90", "sm_100"])
def test_tiles_are_copied_asynchronously_and_reduced_in_registers(reports, target):
    for case, report in of(reports, target, "encode").items():
        assert report["async_copies"] > 0, case
        assert report["shuffles"] <= 16, f"{case}: groups must lie within a thread, but for one round of stores"


@pytest.mark.parametrize("target", TARGETS)
def test_rows_are_read_in_words_of_128_bits(reports, target):
    for kernel in ("resolve", "select", "decode", "act_grad", "latent_grad", "row_update", "latent_step", "center"):
        for case, report in of(reports, target, kernel).items():
            assert report["loads_128"] > 0, case
