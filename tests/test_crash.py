"""Real processes, killed in the middle of a save and told to stop: what is resumed ends as if nothing had been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from models import save_model, token_rows
from test_resume import files

SLOW_DISK = """
import os, time
kind, suffix, needs, marker = os.environ["SLOW_DISK"].split("|")

def slow(made, called, path_of):
    def wrapped(*args, **kwargs):
        if called == kind and str(path_of(*args)).endswith(suffix) and os.path.exists(needs):
            open(marker, "w").close()
            while not os.path.exists(marker + ".go"):
                time.sleep(0.02)
        return made(*args, **kwargs)
    return wrapped

os.fsync = slow(os.fsync, "sync", lambda fd: os.readlink(f"/proc/self/fd/{fd}"))
os.replace = slow(os.replace, "move", lambda source, target: target)
"""
"""A disk that waits: before what ends in ``suffix`` is synced or moved into place, if ``needs`` exists."""

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/fd").is_dir(), reason="needs Linux's /proc to know files by number"
)


class Command:
    """``python -m fastsae train`` on a tiny model, each time a process of its own."""

    def __init__(self, tmp_path: Path):
        self.tmp_path = tmp_path
        save_model("gpt2", tmp_path / "model")
        token_rows(42, 8).to_parquet(tmp_path / "data.parquet")
        (tmp_path / "sitecustomize.py").write_text(SLOW_DISK)
        self.begin = [
            str(tmp_path / "model"), str(tmp_path / "data.parquet"), "--hookpoints", "h.1", "--num-latents", "64",
            "--k", "4", "--batch-size", "4", "--lr", "0.01", "--save-every", "4", "--optimizer", "adam8bit",
            "--keep-last", "2", "--save-best",
        ]  # fmt: skip

    def start(self, *arguments: str, slow: str = "|||") -> subprocess.Popen[str]:
        path = os.pathsep.join([str(self.tmp_path), *sys.path])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "SLOW_DISK": slow, "COLUMNS": "200"}
        return subprocess.Popen(
            [sys.executable, "-m", "fastsae", "train", *arguments], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
            text=True, env=environment,
        )  # fmt: skip

    def finish(self, *arguments: str) -> str:
        process = self.start(*arguments)
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        return err

    def stop(self, *arguments: str, at: str, signum: int) -> tuple[int, str]:
        """Send ``signum`` while the process waits for its disk ``at`` a place; (exit code, stderr)."""
        marker = self.tmp_path / "waits"
        marker.unlink(missing_ok=True)
        process = self.start(*arguments, slow=f"{at}|{marker}")
        deadline = time.monotonic() + 300
        while not marker.exists():
            assert process.poll() is None, process.stderr and process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signum)
        go = marker.with_name(f"{marker.name}.go")
        if signum != signal.SIGKILL:
            go.touch()
        _, err = process.communicate(timeout=300)
        go.unlink(missing_ok=True)
        return process.returncode, err


def test_killed_in_the_middle_of_saves_and_stopped_then_resumed(tmp_path):
    command = Command(tmp_path)
    command.finish(*command.begin, "--save-dir", str(tmp_path / "whole"), "--run-name", "run")
    run, state = tmp_path / "out/run", tmp_path / "out/run/state"
    begin = [*command.begin, "--save-dir", str(tmp_path / "out"), "--run-name", "run"]

    code, _ = command.stop(*begin, at=f"sync|step-8.part/state.json|{state}/step-4", signum=signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert sorted(path.name for path in state.glob("step-*")) == ["step-4", "step-8.part"]

    code, _ = command.stop(
        "--resume", str(run), at=f"move|run/h.1/cfg.json|{state}/step-8", signum=signal.SIGKILL
    )  # the new weights are there, with the old config beside them
    assert code == -signal.SIGKILL
    assert (run / "h.1/cfg.json.part").is_file()

    code, err = command.stop("--resume", str(run), at=f"sync|cfg.json.part|{state}/step-8", signum=signal.SIGTERM)
    assert code == 128 + signal.SIGTERM
    assert f"saved after step 8 of 10; go on with: fastsae train --resume {run}" in " ".join(err.split())

    assert "going on after step 8 of 10: h.1" in command.finish("--resume", str(run))
    whole = files(tmp_path / "whole/run")
    assert files(run) == whole
    assert {"h.1/sae.safetensors", "steps/8/h.1/sae.safetensors", "steps/10/h.1/cfg.json", "best/best.json"} <= set(
        whole
    )
