"""What users type, as typer reads it: lists behind one option, underscores, ``--flag true``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from .run_config import TOKEN_NAMES

SWITCH = {"on": True, "true": True, "off": False, "false": False}

_VALUED = {"--config", "--resume"}  # options with a value that no config has


def normalise(arguments: list[str], configs: tuple[type, ...]) -> list[str]:
    """Rewrite users' habits into what typer reads: ``--a_b x y --flag`` -> ``--a-b x --a-b y --flag on``.

    A list takes the values behind it up to the next option, but not the command's own arguments: what can only be
    one of them (see :func:`_is_argument`) ends the list, and so does ``--``.
    """
    kinds = {f"--{name.replace('_', '-')}": hint for config in configs for name, hint in get_type_hints(config).items()}
    out: list[str] = []
    own = -1  # arguments of the command itself, behind its name
    i = 0
    while i < len(arguments):
        argument, i = arguments[i], i + 1
        if not argument.startswith("--") or argument == "--":
            own += argument != "--"
            out.append(argument)
            continue
        name, equals, value = argument.partition("=")
        name = name.replace("_", "-")
        hint = kinds.get(name)
        if kinds.get(positive := name.replace("--no-", "--", 1)) is bool and not equals:
            switch = positive == name
            if switch and i < len(arguments) and arguments[i].lower() in SWITCH:
                switch, i = SWITCH[arguments[i].lower()], i + 1
            out += [positive, "on" if switch else "off"]
        elif get_origin(hint) is tuple and not equals:
            first = i
            while i < len(arguments) and not arguments[i].startswith("--"):
                if i > first and _is_argument(arguments[i], get_args(hint)[0], own):
                    break
                out += [name, arguments[i]]
                i += 1
        else:
            out.append(name + equals + value)
            if (
                (hint is not None or name in _VALUED) and not equals and i < len(arguments)
            ):  # its value is no argument of the command
                out.append(arguments[i])
                i += 1
    return out


def _is_argument(text: str, item: Any, own: int) -> bool:
    """Whether ``text``, behind values of a list of ``item``, is the command's MODEL or DATASET instead of a value.

    Paths are, hub ids with a slash, and text among integers; before there is a MODEL, single words are, too
    (``gpt2``): hookpoints and token ids do not look like that.
    """
    if own >= 2:
        return False
    if item is int:
        return not all(part.lstrip("-").isdecimal() or part in TOKEN_NAMES for part in text.split(",") if part)
    word = not any(mark in text for mark in ".*?[]:=,") and not text.isdecimal()
    return "/" in text or _is_there(Path(text)) or text in ("demo", "stdlib") or (own < 1 and word)


def _is_there(path: Path) -> bool:
    """Whether a file, a model's folder or a dataset's is; a run's folders of coders are named by hookpoints."""
    return path.is_file() or any((path / name).is_file() for name in ("config.json", "state.json", "dataset_dict.json"))
