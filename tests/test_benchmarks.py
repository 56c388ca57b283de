"""The measuring scripts run, and what they print adds up; their figures are no tests."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(script: str, *arguments: str) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, BENCHMARKS / script, *arguments], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_profile_adds_up():
    out = run("profile_training.py", "--tokens", "6000")
    shares = dict(re.findall(r"^(model forward|coder step|optimizer|data|rest) .*?([\d.]+) %$", out, re.M))
    assert len(shares) == 5
    assert sum(map(float, shares.values())) == pytest.approx(100, abs=0.3)
    assert float(shares["coder step"]) > 1
    assert float(shares["model forward"]) > 1


def test_growth_doubles_what_it_says(tmp_path):
    run("growth.py", "--doublings", "1", "--json", str(tmp_path / "growth.json"))
    rows = json.loads((tmp_path / "growth.json").read_text())
    assert [(row["N"], row["L"]) for row in rows] == [(512, 4096), (1024, 4096), (512, 4096), (512, 8192)]
    assert all(row["ms"] > 0 for row in rows)


def test_the_table_is_made_of_the_record(tmp_path):
    result = {"median_ms": 10.0, "peak_mib": 5.0, "fvu": 0.25, "ms": [10.0]}
    record = {
        "environment": {"gpu": None, "cpu": "CPU", "threads": 2, "date": "2026-01-01", "commit": "abcdef012"}
        | {"versions": {"fastsae": "1", "triton": None}},
        "cases": {
            "C": {
                "setting": {"N": 1, "D": 2, "L": 3, "k": 4, "steps": 5},
                "hookpoint": None,
                "results": {"fastsae": result, "sparsify": result | {"median_ms": 40.0}},
            }
        },
    }
    (tmp_path / "r.json").write_text(json.dumps(record))
    page = tmp_path / "README.md"
    page.write_text("a\n<!-- peers-table -->\nold\n<!-- /peers-table -->\nb\n")
    run("peers/table.py", str(tmp_path / "r.json"), "--write", str(page), "--chart", str(tmp_path / "c.svg"))
    drawn = re.findall(r"<text[^>]*>([^<]+)</text>", (tmp_path / "c.svg").read_text())
    assert {"fastsae", "sparsify", "2 threads of an CPU: 1 tokens, D = 2, L = 3, k = 4"} <= set(drawn)
    assert {"1.0 × (10 ms)", "4.0 × (40 ms)"} <= set(drawn)
    assert "|  | sparsify | 40 | 0.25 of it | 5 | 0.2500 |" in page.read_text()
    assert "commit abcdef0, fastsae 1." in page.read_text()
    assert "old" not in page.read_text()
    assert page.read_text().startswith("a\n")
    assert page.read_text().endswith("b\n")


def test_scaling_measures_every_mode_and_makes_the_tables(tmp_path):
    small = ["--ranks", "2", "--rounds", "1", "--steps", "1", "--latents", "256", "--sequences", "4"]
    page = tmp_path / "README.md"
    page.write_text("a\n<!-- scaling -->\nold\n<!-- /scaling -->\n<!-- links -->\n<!-- /links -->\nb\n")
    run("scaling.py", *small, "--json", str(tmp_path / "scaling.json"), "--write", str(page))
    record = json.loads((tmp_path / "scaling.json").read_text())
    assert set(record["seconds"]) == {"replicas", "--distribute-modules", "--distribute-latents"}
    assert all(len(times["2"]) == 1 for times in record["seconds"].values())
    assert all(sent["2"] > 0 for sent in record["sent"].values())
    three_of_six = 3 * 2 * 256 * 512 * 4  # hookpoints, sequences, tokens, width, bytes
    assert record["sent"]["--distribute-modules"]["2"] == pytest.approx(three_of_six, rel=1e-3)
    text = page.read_text()
    assert "old" not in text
    assert "| --distribute-modules | 1.1 GB | 138 MB: 0.3 / 30 ms |" in text.replace("|  |", "|")  # 11 x 8192 x 768 x 2
    rows, width, picked = 8 * 8192, 768, 32  # of a node: sums, rows and candidates; between two: slices' gradients
    within = 12 * (2 * 7 / 8 * 4 * rows * width + 7 * 2 * rows / 8 * width + 7 * 8 * rows * picked)
    across = 12 * 24576 / 8 * 2 * 768 * 4
    split = next(line for line in text.splitlines() if "| --distribute-latents 8 |" in line).split(" | ")[4]
    assert split.startswith(f"{(within + across) / 1e9:.1f} GB: {within / 450e6 + across / 50e6:.0f} / ")
    seconds = record["seconds"]["replicas"]
    assert f"| replicas | {1024 / seconds['2'][0]:,.0f} | 1.00 x |" in text


def test_whole_runs_are_timed_from_batch_to_batch(tmp_path):
    small = ["--size", "tiny", "--only", "fastsae", "--rounds", "1", "--warm", "1", "--steps", "2"]
    out = run("peers/end_to_end.py", *small, "--json", str(tmp_path / "out.json"))
    record = json.loads((tmp_path / "out.json").read_text())
    (found,) = record["rounds"]["fastsae"]
    assert 0 < found["fvu"] < 1.2
    assert found["peak_mib"] > 1
    assert re.search(rf"^fastsae +{found['tokens_per_second']:,.0f} ", out, re.M)
    assert record["setting"]["latents"] == 512
