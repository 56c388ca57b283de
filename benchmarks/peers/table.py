"""README's comparison table, made of raw results: ``python benchmarks/peers/table.py benchmarks/results/FILE``.

Prints Markdown; with ``--write README.md`` replaces what stands between the two ``peers-table`` comments there.
``--chart FILE.svg`` draws the times, too.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from chart import draw, machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--chart", type=Path)
    args = parser.parse_args()
    records = {path: json.loads(path.read_text()) for path in args.results}
    text = "\n\n".join(table(record, path) for path, record in records.items())
    if args.chart is not None:
        draw(list(records.values()), args.chart)
    if args.write is None:
        print(text)
        return
    write_between(args.write, "peers-table", text)


def write_between(page: Path, mark: str, text: str) -> None:
    """Replace what stands between the comments ``mark`` and ``/mark`` in ``page``."""
    pattern, old = rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)", page.read_text()
    if not re.search(pattern, old, re.S):
        raise SystemExit(f"expected <!-- {mark} --> and <!-- /{mark} --> in {page}, found none")
    page.write_text(re.sub(pattern, lambda match: match[1] + text + "\n" + match[2], old, flags=re.S))


def table(record: dict, path: Path) -> str:
    """One record as Markdown."""
    e = record["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in e["versions"].items() if version)
    lines = [
        "| step (Adam) | library | ms | fastsae takes | peak MiB | held-out FVU |",
        "|---|---|---|---|---|---|",
    ]
    for case in record["cases"].values():
        s, results = case["setting"], case["results"]
        where = f"embedded {case['hookpoint']}" if case["hookpoint"] else "synthetic"
        label = f"N={s['N']} D={s['D']} L={s['L']} k={s['k']}, {s['steps']} steps, {where}"
        for name, r in results.items():
            share = "" if name == "fastsae" else f"{results['fastsae']['median_ms'] / r['median_ms']:.2f} of it"
            lines.append(
                f"| {label} | {name} | {r['median_ms']:.0f} | {share} | {r['peak_mib']:.0f} | {r['fvu']:.4f} |"
            )
            label = ""
    source = (
        f"Raw times: `benchmarks/results/{path.name}`; {machine(e)}, {e['date']}, commit {e['commit'][:7]}, {versions}."
    )
    return "\n".join(lines) + "\n\n" + source


if __name__ == "__main__":
    main()
