"""Which saved coder each coder of a run goes on from (``--finetune``)."""

from __future__ import annotations

from collections.abc import Iterable

from .errors import CheckpointError


def match_coders(wanted: Iterable[str], available: Iterable[str]) -> dict[str, str]:
    """For every coder of a run the saved one to go on from (``--finetune``): by name, else by hookpoint.

    ``h.0/seed1`` goes on from ``h.0/seed1``, else from ``h.0``, else from the hookpoint's only coder. A single coder
    that has no name of its own ("") is for a single hookpoint. Raises :class:`CheckpointError` where one is missing.
    """
    wanted, available = list(wanted), list(available)
    hookpoints = {name.partition("/")[0] for name in wanted}
    matches = {}
    for name in wanted:
        hookpoint = name.partition("/")[0]
        alike = [other for other in available if other.partition("/")[0] == hookpoint]
        if name in available:
            matches[name] = name
        elif hookpoint in available:
            matches[name] = hookpoint
        elif len(alike) == 1:
            matches[name] = alike[0]
        elif available == [""] and len(hookpoints) == 1:
            matches[name] = ""
        else:
            listed = ", ".join(alike or available[:8]) or "none"
            raise CheckpointError(f"finetune: expected a saved coder for {name}, found {listed}")
    return matches
