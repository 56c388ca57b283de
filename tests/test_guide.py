"""Every command and every Python block of docs/guide.md, run in order in one folder, on less text."""

import json
import re
import shlex
from pathlib import Path

from test_cli import run

from fastsae import demo

GUIDE = (Path(__file__).parents[1] / "docs/guide.md").read_text()
LESS = {r"--max-tokens \d+": "--max-tokens 5120", r"\bstdlib\b": "some.jsonl"}
"""In place of the guide's sizes and text: what is tested is that the commands work, not what they find."""


def test_the_guide(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sources = [path.read_text(encoding="utf-8") for path in demo.stdlib_sources()[:12]]
    (tmp_path / "some.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in sources))
    blocks = re.findall(r"```(bash|python)\n(.*?)```", GUIDE, re.S)
    commands = [line for kind, text in blocks if kind == "bash" for line in text.splitlines() if line]
    assert len(commands) == len(re.findall(r"^fastsae ", GUIDE, re.M)) > 10
    for kind, text in blocks:
        if kind == "python":
            exec(compile(text, "guide.md", "exec"), {})
            continue
        for command in text.splitlines():
            for pattern, less in LESS.items():
                command = re.sub(pattern, less, command)
            arguments = shlex.split(command)
            code, _, err = run(capsys, *arguments[1:], *(["--device", "cpu"] if takes_device(arguments[1]) else []))
            assert code == 0, f"{command}: {err}"
    assert {path.name for path in tmp_path.iterdir()} >= {
        "checkpoints", "compared.json", "for-saelens", "for-dictionary-learning", "theirs.json", "activations",
    }  # fmt: skip
    assert (tmp_path / "checkpoints/first/report.html").stat().st_size > 100_000


def takes_device(command: str) -> bool:
    return command not in ("info", "convert")


def test_options_named_in_its_text_exist(capsys):
    _, out, _ = run(capsys, "train", "--help")
    for option in ("--micro-acc-steps", "--batch-size", "--optimizer", "--transcode", "--hookpoints"):
        assert option in out
        assert option in GUIDE
    assert "adam8bit" in out
