"""Command-line options made from the configs: one list of options, documented where it is defined.

A list's values are repeated options, or one with commas; :mod:`.arguments` reads other habits of sparsify's users.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import types
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

from .arguments import SWITCH
from .errors import ConfigError
from .fields import field_docs

_NESTED = {"sae"}
_UNSPLIT = {"set"}  # a comma is part of its values


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
    mine = {name: convert(name, value, hints[name]) for name, value in values.items() if name in known}
    return config(**mine, **nested)


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


def convert(name: str, value: Any, hint: Any) -> Any:
    """A value as the command line or a file gives it -> what the field holds; the config checks it afterwards."""
    plain = _without_none(hint)
    if get_origin(plain) is tuple:
        return _convert_list(name, value, get_args(plain)[0])
    if not isinstance(value, str):
        return value
    if plain is bool:
        if value.lower() not in SWITCH:
            raise ConfigError(f"{name}: expected on or off, got {value!r}")
        return SWITCH[value.lower()]
    if plain in (int, float):
        try:
            return plain(value)
        except ValueError:
            raise ConfigError(
                f"{name}: expected {'an integer' if plain is int else 'a number'}, got {value!r}"
            ) from None
    return value


def _convert_list(name: str, value: Any, item: Any) -> tuple:
    parts = value if isinstance(value, (list, tuple)) else [value]
    if name not in _UNSPLIT:
        parts = [text for part in parts for text in (part.split(",") if isinstance(part, str) else [part])]
    parts = [part.strip() if isinstance(part, str) else part for part in parts]
    parts = [part for part in parts if part != ""]
    try:
        return tuple(int(part) if item is int and isinstance(part, str) else part for part in parts)
    except ValueError:
        raise ConfigError(f"{name}: expected integers, got {', '.join(map(str, parts))}") from None


def close_names(name: str, names: Iterable[str]) -> str:
    """``; did you mean k?``, or the names there are."""
    close = difflib.get_close_matches(name, names := list(names), n=3)
    return f"; did you mean {' or '.join(close)}?" if close else f"; there are {', '.join(names)}"
