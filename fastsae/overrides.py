"""Different coders at different hookpoints, and several at one: ``--set "h.[0-3].*:k=64,expansion_factor=16"``.

``PATTERN:FIELD=VALUE,...`` changes fields of :class:`SaeConfig` where the wildcard matches; later overrides win, field
by field. Several values of a field, ``k=32|64``, make a variant of the coder for each; with several such fields, one
for each combination. A list's items are joined by ``+``: ``matryoshka_widths=64+512``. All are trained from the same
pass of the model.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, get_type_hints

from .coder_config import SaeConfig
from .errors import ConfigError, HookpointError
from .fields import check_type
from .options import close_names, convert

WHOLE_RUN = {"transcode"}
"""Fields that are the same for every coder of a run."""


@dataclass(frozen=True)
class Override:
    """One ``--set``."""

    pattern: str
    """Wildcard on the hookpoints' names."""

    values: tuple[tuple[str, tuple[Any, ...]], ...]
    """(field, its values) pairs."""


def parse_override(text: str) -> Override:
    """``PATTERN:FIELD=VALUE[|VALUE...],...``; raises :class:`ConfigError` for anything else."""
    pattern, colon, assignments = text.partition(":")
    if not (pattern.strip() and colon and assignments.strip()):
        raise ConfigError(f'set: expected PATTERN:field=value,..., got {text!r}; such as "h.[0-3].*:k=64"')
    pairs = [_parse_assignment(part, text) for part in assignments.split(",") if part.strip()]
    if doubled := next((name for name, _ in pairs if [n for n, _ in pairs].count(name) > 1), None):
        raise ConfigError(f"set: expected {doubled} once in {text!r}; several values go together: {doubled}=32|64")
    return Override(pattern.strip(), tuple(pairs))


def resolve_variants(
    base: SaeConfig, overrides: Iterable[Override], hookpoints: Iterable[str]
) -> dict[str, dict[str, SaeConfig]]:
    """Hookpoint -> variant -> config; the variant is "" where a hookpoint has one coder, else such as ``k32``.

    Raises :class:`HookpointError` for a pattern that matches none of the hookpoints, and :class:`ConfigError`, with
    the hookpoint's name, for a config that cannot be.
    """
    overrides, hookpoints = list(overrides), list(hookpoints)
    for override in overrides:
        if not any(fnmatchcase(name, override.pattern) for name in hookpoints):
            raise HookpointError(
                f"set: no hookpoint of this run matches {override.pattern!r}; it trains on "
                f"{', '.join(hookpoints[:4])}{', ...' if len(hookpoints) > 4 else ''}"
            )
    return {name: _variants(base, name, overrides) for name in hookpoints}


def coder_name(hookpoint: str, variant: str = "", seed: int | None = None) -> str:
    """A coder's name, which is also its folder in a run: ``HOOK``, ``HOOK/seed1``, ``HOOK/k32``, ``HOOK/k32/seed1``."""
    return "/".join([hookpoint, *([variant] if variant else []), *([] if seed is None else [f"seed{seed}"])])


def _variants(base: SaeConfig, hookpoint: str, overrides: list[Override]) -> dict[str, SaeConfig]:
    values: dict[str, tuple[Any, ...]] = {}
    for override in overrides:
        if fnmatchcase(hookpoint, override.pattern):
            values.update(override.values)
    if "expansion_factor" in values and "num_latents" not in values:
        values["num_latents"] = (0,)  # else a number of latents set for all would win over it
    variants = {}
    for chosen in itertools.product(*values.values()):
        fields = dict(zip(values, chosen, strict=True))
        label = "-".join(f"{name}{_written(value)}" for name, value in fields.items() if len(values[name]) > 1)
        try:
            variants[label] = dataclasses.replace(base, **fields)
        except ConfigError as error:
            raise ConfigError(f"set: {hookpoint}: {error}") from None
    return variants


def _written(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _parse_assignment(part: str, text: str) -> tuple[str, tuple[Any, ...]]:
    name, equals, written = part.partition("=")
    name = name.strip().replace("-", "_")
    hints = get_type_hints(SaeConfig)
    if name in WHOLE_RUN:
        raise ConfigError(f"set: {name} is the same for all coders of a run, got {text!r}; use --{name}")
    if name not in hints:
        raise ConfigError(f"set: expected a field of a coder, got {name!r} in {text!r}{close_names(name, hints)}")
    if not (equals and written.strip()):
        raise ConfigError(f"set: expected {name}=value, got {part.strip()!r} in {text!r}")
    values = tuple(convert(name, value.strip().replace("+", ","), hints[name]) for value in written.split("|"))
    for value in values:
        check_type(name, value, hints[name])
    if len(set(values)) < len(values):
        raise ConfigError(f"set: expected distinct values of {name}, got {written.strip()!r}")
    return name, values
