"""Command-line options made from the configs: one list of options, documented where it is defined.

Also the habits that sparsify's users bring along: ``--hookpoints a b``, ``--hookpoints a,b``, repeated
options, underscores in option names, and ``--flag true``.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
from collections.abc import Callable
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

from .errors import ConfigError
from .fields import field_docs

_NESTED = {"sae"}
_SWITCH = {"on": True, "true": True, "off": False, "false": False}


def with_options(*configs: type) -> Callable[[Callable], Callable]:
    """Give a typer command one keyword option for every field of the configs; unset ones are not passed on."""

    def decorate(command: Callable) -> Callable:
        hints = get_type_hints(command, include_extras=True)
        own = [
            p.replace(annotation=hints[p.name])
            for p in inspect.signature(command).parameters.values()
            if p.kind is not p.VAR_KEYWORD
        ]
        parameters = [parameter for config in configs for parameter in _parameters(config)]

        def call(**values: Any) -> None:
            names = {p.name for p in parameters}
            given = {n: v for n, v in values.items() if n in names and v is not None and v != []}
            command(**{n: v for n, v in values.items() if n not in names}, **given)

        call.__signature__ = inspect.Signature(own + parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {p.name: p.annotation for p in own + parameters}
        call.__name__, call.__doc__ = command.__name__, command.__doc__
        return call

    return decorate


def build(config: type, values: dict[str, Any], **nested: Any) -> Any:
    """Make a config from the option values that are its own; lists arrive as text and are split at commas."""
    hints = get_type_hints(config)
    known = {f.name for f in dataclasses.fields(config)} - _NESTED
    mine = {name: _convert(name, value, hints[name]) for name, value in values.items() if name in known}
    return config(**mine, **nested)


def normalise(arguments: list[str], configs: tuple[type, ...]) -> list[str]:
    """Rewrite users' habits into what typer reads: ``--a_b x y --flag`` -> ``--a-b x --a-b y --flag on``."""
    kinds = {f"--{name.replace('_', '-')}": hint for config in configs for name, hint in get_type_hints(config).items()}
    out: list[str] = []
    i = 0
    while i < len(arguments):
        argument, i = arguments[i], i + 1
        if not argument.startswith("--") or argument == "--":
            out.append(argument)
            continue
        name, equals, value = argument.partition("=")
        name = name.replace("_", "-")
        hint = kinds.get(name)
        if kinds.get(positive := name.replace("--no-", "--", 1)) is bool and not equals:
            switch = positive == name
            if switch and i < len(arguments) and arguments[i].lower() in _SWITCH:
                switch, i = _SWITCH[arguments[i].lower()], i + 1
            out += [positive, "on" if switch else "off"]
        elif get_origin(hint) is tuple and not equals:
            while i < len(arguments) and not arguments[i].startswith("--"):
                out += [name, arguments[i]]
                i += 1
        else:
            out.append(name + equals + value)
    return out


def _parameters(config: type) -> list[inspect.Parameter]:
    docs, hints = field_docs(config), get_type_hints(config)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                _option_type(hints[field.name]),
                typer.Option(
                    f"--{field.name.replace('_', '-')}",
                    help=docs[field.name] + _details(field, hints[field.name]),
                    show_default=False,
                    metavar=_metavar(hints[field.name]),
                    rich_help_panel=config.__doc__ and config.__doc__.split(";")[0].rstrip("."),
                ),
            ],
        )
        for field in dataclasses.fields(config)
        if field.name not in _NESTED
    ]


def _option_type(hint: Any) -> Any:
    """Lists and choices are read as text and checked by the config, whose messages are ours."""
    if get_origin(hint) is tuple:
        return list[str] | None
    plain = _without_none(hint)
    return (plain if plain in (int, float) else str) | None


def _without_none(hint: Any) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        return next(arg for arg in get_args(hint) if arg is not type(None))
    return hint


def _metavar(hint: Any) -> str | None:
    plain = _without_none(hint)
    if get_origin(plain) is Literal:
        return "CHOICE"
    if get_origin(plain) is tuple:
        return "LIST"
    return {int: "INT", float: "NUMBER", str: "TEXT", bool: "on|off"}.get(plain)


def _details(field: dataclasses.Field, hint: Any) -> str:
    """The choices and the default, to stand behind the sentence."""
    plain, default = _without_none(hint), field.default
    details = [" | ".join(map(str, get_args(plain)))] if get_origin(plain) is Literal else []
    if isinstance(default, bool):
        details.append(f"default: {'on' if default else 'off'}")
    elif isinstance(default, tuple) and default:
        details.append(f"default: {','.join(map(str, default))}")
    elif isinstance(default, (int, float, str)):
        details.append(f"default: {default}")
    return f" [dim]({'; '.join(details)})[/]" if details else ""


def _convert(name: str, value: Any, hint: Any) -> Any:
    if hint is bool:
        if value.lower() not in _SWITCH:
            raise ConfigError(f"{name}: expected on or off, got {value!r}")
        return _SWITCH[value.lower()]
    if get_origin(hint) is not tuple:
        return value
    item = get_args(hint)[0]
    texts = [text.strip() for part in value for text in str(part).split(",") if text.strip()]
    try:
        return tuple(int(text) if item is int else text for text in texts)
    except ValueError:
        raise ConfigError(f"{name}: expected integers, got {', '.join(texts)}") from None
