"""Every command and every Python block of docs/guide.md, run in order in one folder, on less text."""

import dataclasses
import json
import re
import shlex
from pathlib import Path

from guide_worker import main
from ranks import launch_ranks
from test_cli import run
from torch.distributed.run import get_args_parser

from fastsae import demo
from fastsae.cli import CONFIGS
from fastsae.resume import check_resume_options

GUIDE = (Path(__file__).parents[1] / "docs/guide.md").read_text()
LESS = {r"--max-tokens \d+": "--max-tokens 5120", r"\bstdlib\b": "some.jsonl"}
"""In place of the guide's sizes and text: what is tested is that the commands work, not what they find."""


def test_the_guide(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sources = [path.read_text(encoding="utf-8") for path in demo.stdlib_sources()[:12]]
    (tmp_path / "some.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in sources))
    blocks = re.findall(r"```(bash|python)\n(.*?)```", GUIDE, re.S)
    commands = [line for kind, text in blocks if kind == "bash" for line in text.splitlines() if line]
    assert len(commands) == len(re.findall(r"^(?:fastsae|torchrun) ", GUIDE, re.M)) > 10
    for kind, text in blocks:
        if kind == "python":
            exec(compile(text, "guide.md", "exec"), {})
            continue
        for command in text.splitlines():
            for pattern, less in LESS.items():
                command = re.sub(pattern, less, command)
            arguments = shlex.split(command)
            if arguments[0] == "torchrun":
                ranks, arguments = of_torchrun(arguments)
                launch_ranks(ranks, main, tmp_path, [*arguments, "--device", "cpu"])
                continue
            code, _, err = run(capsys, *arguments[1:], *(["--device", "cpu"] if takes_device(arguments[1]) else []))
            assert code == 0, f"{command}: {err}"
    assert {path.name for path in tmp_path.iterdir()} >= {
        "checkpoints", "compared.json", "for-saelens", "for-dictionary-learning", "theirs.json", "activations",
    }  # fmt: skip
    assert (tmp_path / "checkpoints/first/report.html").stat().st_size > 100_000
    for run_name in ("replicas", "owned", "split"):
        assert (tmp_path / "checkpoints" / run_name / "h.3/sae.safetensors").is_file()


def of_torchrun(arguments: list[str]) -> tuple[int, list[str]]:
    """(processes, arguments of ``fastsae``), by torchrun's own parser."""
    options = get_args_parser().parse_args(arguments[1:])
    assert (options.module, options.training_script) == (True, "fastsae")
    return int(options.nproc_per_node), options.training_script_args


def test_commands_that_need_more_than_this_machine_have_options_that_exist():
    """Those that stand indented: more machines, or runs that were stopped."""
    text = GUIDE.replace("\\\n", " ")
    commands = [shlex.split(line) for line in re.findall(r"^    ((?:torchrun|fastsae) .*)", text, re.M)]
    assert len(commands) == 4
    fields = {field.name for config in CONFIGS for field in dataclasses.fields(config)}
    for command in commands:
        arguments = of_torchrun(command)[1] if command[0] == "torchrun" else command[1:]
        given = {part[2:].replace("-", "_") for part in arguments if part.startswith("--")}
        assert given - {"resume"} <= fields
        if "resume" in given:
            check_resume_options(given - {"resume"})


def takes_device(command: str) -> bool:
    return command not in ("info", "convert")


def test_options_named_in_its_text_exist(capsys):
    _, out, _ = run(capsys, "train", "--help")
    for option in ("--micro-acc-steps", "--batch-size", "--optimizer", "--transcode", "--hookpoints"):
        assert option in out
        assert option in GUIDE
    assert "adam8bit" in out
