"""Reading a config's fields: the sentence under each, and whether its value has the declared type."""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .errors import ConfigError


def field_docs(config: type) -> dict[str, str]:
    """The sentence under each field of a config, by the field's name."""
    (cls,) = ast.parse(textwrap.dedent(inspect.getsource(config))).body
    assert isinstance(cls, ast.ClassDef)
    docs = {}
    for node, after in zip(cls.body, cls.body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(after, ast.Expr):
            docs[node.target.id] = str(ast.literal_eval(after.value))
    return docs


def check_types(config: Any) -> None:
    """Raise :class:`ConfigError` for the first field whose value does not have its declared type."""
    for name, expected in get_type_hints(type(config)).items():
        check_type(name, getattr(config, name), expected)


def check_type(name: str, value: Any, expected: Any) -> None:
    """Raise :class:`ConfigError` where ``value`` does not have the declared type."""
    if not _has_type(value, expected):
        raise ConfigError(f"{name}: expected {_describe(expected)}, got {value!r}")


def _has_type(value: Any, expected: Any) -> bool:
    origin, args = get_origin(expected), get_args(expected)
    if origin is Literal:
        return value in args
    if origin in (Union, types.UnionType):
        return any(_has_type(value, arg) for arg in args)
    if origin is tuple:
        return isinstance(value, tuple) and all(_has_type(item, args[0]) for item in value)
    if expected is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value
    if expected is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, expected)


def _describe(expected: Any) -> str:
    origin, args = get_origin(expected), get_args(expected)
    if origin is Literal:
        return " or ".join(map(repr, args))
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(arg) for arg in args)
    if origin is tuple:
        return f"a list of {_describe(args[0])}"
    return {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "nothing"}.get(
        expected, getattr(expected, "__name__", str(expected))
    )


def require(ok: bool, name: str, expected: str, got: Any) -> None:
    if not ok:
        raise ConfigError(f"{name}: expected {expected}, got {got!r}")
