"""Which rank owns which coders: longest processing time first, the greedy rule of Graham (1969).

A coder's cost is its number of matrix parameters: the encoder's product, the optimizer's traffic and the memory that
its states take are all proportional to it.
"""

from __future__ import annotations

from collections.abc import Mapping


def owners(costs: Mapping[str, int], ranks: int) -> dict[str, int]:
    """The rank that owns each coder, by name (``HOOKPOINT`` or ``HOOKPOINT/...``).

    Coders of one hookpoint stay together, so that its activations travel once, unless there are fewer hookpoints than
    ranks. The heaviest goes first, to the rank with the least; among equal ones the earlier, and the lower rank. No
    rank's load exceeds 4/3 of what the best plan's heaviest has.
    """
    hookpoints: dict[str, list[str]] = {}
    for name in costs:
        hookpoints.setdefault(name.partition("/")[0], []).append(name)
    units = list(hookpoints.values()) if len(hookpoints) >= ranks else [[name] for name in costs]
    loads, found = [0] * ranks, {}
    for unit in sorted(units, key=lambda names: -sum(costs[name] for name in names)):
        rank = loads.index(min(loads))
        loads[rank] += sum(costs[name] for name in unit)
        found |= dict.fromkeys(unit, rank)
    return {name: found[name] for name in costs}


def describe(costs: Mapping[str, int], owner: Mapping[str, int], ranks: int) -> list[str]:
    """A line per rank: its coders, and its share of all parameters."""
    lines, total = [], sum(costs.values())
    for rank in range(ranks):
        names = [name for name in costs if owner[name] == rank]
        own = sum(costs[name] for name in names)
        lines.append(f"rank {rank}: {own / 1e6:.1f} M parameters ({own / total:.0%}): {', '.join(names) or 'no coder'}")
    return lines
