"""Runs on several processes, killed at random and resumed, until the time is up: nothing may be lost.

    python benchmarks/soak.py --minutes 30 --ranks 4 [--json FILE]

Each round trains the embedded model's coders through torchrun with gloo, in one of three ways in turn (replicas,
--distribute-modules, --distribute-latents), and kills it again and again, at random steps: one process, or all of
them at once (SIGKILL), or a polite SIGTERM. What the last --resume leaves is compared with a run that nothing
stopped: the coders' files byte for byte, every record of metrics.jsonl. The first difference ends it with exit code 1,
and the folders stay.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

STEPS, SAVE_EVERY = 40, 5
WAYS = {
    "replicas": ["--optimizer", "adam"],
    "modules": ["--distribute-modules", "--optimizer", "adam8bit", "--token-buffer", "300"],
    "latents": ["--distribute-latents", "{ranks}", "--optimizer", "signum"],
}
PATIENCE = 300  # seconds that a process may take to start, or to end


class Soak:
    """Rounds of one soak, in ``folder``; ``counts`` says what happened."""

    def __init__(self, folder: Path, ranks: int, seed: int):
        self.folder, self.ranks, self._random = folder, ranks, random.Random(seed)
        self.counts: Counter[str] = Counter()
        self._whole: dict[str, dict[str, bytes]] = {}

    def round(self, way: str, kills: int) -> bool:
        """One run that is killed ``kills`` times; whether it ended as one that was not."""
        if way not in self._whole:
            whole = self._start(way, f"{way}-whole")
            assert whole.wait(PATIENCE) == 0, f"the run that nothing stopped failed: {way}"
            self._whole[way] = contents(self.folder / f"{way}-whole")
        name = f"{way}-{self.counts['rounds']}"
        run = self.folder / name
        shutil.rmtree(run, ignore_errors=True)
        for _ in range(kills):
            self._kill(self._start(way, name), run)
        while (code := self._start(way, name).wait(PATIENCE)) != 0:
            self.counts["failed starts"] += 1
            assert self.counts["failed starts"] < 3, f"{run} cannot be resumed: exit code {code}"
        self.counts["rounds"] += 1
        same = contents(run) == self._whole[way]
        if same:
            shutil.rmtree(run)
        return same

    def _start(self, way: str, name: str) -> subprocess.Popen[bytes]:
        """A new run, or where there is something to go on from, its next part."""
        run, batch = self.folder / name, 2
        if any((run / "state").glob("step-*[0-9]")):
            self.counts["resumes"] += 1
            options = ["--resume", str(run)]
        else:
            shutil.rmtree(run, ignore_errors=True)
            options = ["demo", "stdlib", "--hookpoints", "h.1", "h.2.mlp.act", "--save-dir", str(self.folder)]
            options += ["--run-name", name, *(part.format(ranks=self.ranks) for part in WAYS[way])]
            numbers = {
                "ctx-len": 32, "max-tokens": 32 * (STEPS * self.ranks * batch + 16), "num-latents": 64, "k": 4,
                "batch-size": batch, "save-every": SAVE_EVERY, "log-every": 1, "held-out": 16, "lr": 0.003,
            }  # fmt: skip
            options += [text for key, value in numbers.items() for text in (f"--{key}", str(value))]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.ranks)]
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [*command, "-m", "fastsae", "train", *options], env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.DEVNULL, stderr=log, start_new_session=True,
            )  # fmt: skip

    def _kill(self, agent: subprocess.Popen[bytes], run: Path) -> None:
        """At a random step of what is left, or of nothing, in one of three ways."""
        here = records(run)
        goal = here + self._random.randrange(max(1, STEPS - here))
        deadline = time.monotonic() + PATIENCE
        while agent.poll() is None and records(run) <= goal:
            assert time.monotonic() < deadline, f"{run} does not go on"
            time.sleep(0.002)
        time.sleep(self._random.random() * 0.05)  # in a step, or in a save
        how = self._random.choice(("one process", "all processes", "SIGTERM"))
        if agent.poll() is None:
            self.counts[f"killed: {how}"] += 1
            if how == "one process" and (ranks := children(agent.pid)):
                signal_process(self._random.choice(ranks), signal.SIGKILL)
            elif how == "all processes":
                for pid in (*children(agent.pid), agent.pid):
                    signal_process(pid, signal.SIGKILL)
            else:
                agent.terminate()
        agent.wait(PATIENCE)


def signal_process(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):  # it was quicker
        os.kill(pid, number)


def children(pid: int) -> list[int]:
    """Processes that ``pid`` started (Linux)."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def records(run: Path) -> int:
    """The last step in metrics.jsonl."""
    try:
        return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    except (OSError, IndexError, ValueError):
        return 0


def contents(run: Path) -> dict[str, bytes]:
    """What a finished run left, by name: all but times and the folder's name."""
    found = {
        path.relative_to(run).as_posix(): path.read_bytes()
        for path in sorted(run.rglob("*"))
        if path.is_file() and path.suffix in (".safetensors", ".json") and path.name != "config.json"
    }
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["tokens_per_second"]
    return {**found, "metrics.jsonl": json.dumps(lines).encode()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--kills", type=int, default=4, help="of each run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    folder, begin = Path(tempfile.mkdtemp(prefix="fastsae-soak-")), time.monotonic()
    soak = Soak(folder, args.ranks, args.seed)
    for way in itertools.cycle(WAYS):
        if time.monotonic() - begin > 60 * args.minutes:
            break
        if not soak.round(way, args.kills):
            sys.exit(
                f"{way}: expected the files of a run that nothing stopped, got others; compare the runs in {folder}"
            )
        minutes = (time.monotonic() - begin) / 60
        print(f"{minutes:5.1f} min  {way}: as if nothing had been;", dict(sorted(soak.counts.items())), flush=True)
    shutil.rmtree(folder)
    if args.json:
        args.json.write_text(json.dumps(record(args, soak, (time.monotonic() - begin) / 60), indent=1) + "\n")


def record(args: argparse.Namespace, soak: Soak, minutes: float) -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "date": datetime.date.today().isoformat(), "commit": commit, "python": platform.python_version(),
        "torch": torch.__version__, "cores": os.cpu_count(), "ranks": args.ranks, "minutes": round(minutes, 1),
        "seed": args.seed, **dict(sorted(soak.counts.items())), "differences": 0,
    }  # fmt: skip


if __name__ == "__main__":
    main()
