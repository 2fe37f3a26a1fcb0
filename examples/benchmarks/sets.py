"""Registers sets of pairs with the installed command, one after the other, and prints a row of a table for each.

python examples/benchmarks/sets.py PAIRS.csv [--every N] [--first N] [--labels FILE] [-- options of `regtool register`]

PAIRS.csv: fixed,moving and optionally id, fixed_labels, moving_labels, fixed_landmarks, moving_landmarks; paths relative to it. --labels: the labels
that count, one a line (default: all that both maps have). Seconds are those of the whole command.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

EXTRAS = ("fixed_labels", "moving_labels", "fixed_landmarks", "moving_landmarks")


def score(found: dict, labels: set[str] | None) -> float:
    """Mean landmark error in mm where there are landmarks, else mean Dice."""
    if "tre_mm" in found:
        return found["tre_mm"]["mean"]
    values = [v for k, v in found["dice"]["labels"].items() if labels is None or k in labels]
    return statistics.mean(values)


def main() -> None:
    own, _, options = " ".join(sys.argv[1:]).partition(" -- ")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--first", type=int)
    parser.add_argument("--labels", type=Path)
    arguments = parser.parse_args(own.split())
    labels = set(arguments.labels.read_text().split()) if arguments.labels else None
    with arguments.pairs.open(newline="") as file:
        rows = list(csv.DictReader(file))[:: arguments.every][: arguments.first]
    before, after, folding, seconds = [], [], [], []
    for row in rows:
        with tempfile.TemporaryDirectory() as folder:
            command = ["regtool", "register", *(str(arguments.pairs.parent / row[k]) for k in ("fixed", "moving")), "-o", f"{folder}/out", "-q"]
            command += [part for k in EXTRAS if row.get(k) for part in (f"--{k.replace('_', '-')}", str(arguments.pairs.parent / row[k]))]
            done = subprocess.run([*command, *options.split()], capture_output=True, encoding="utf-8", check=False)
            if done.returncode not in (0, 4):
                sys.exit(f"{row}: exit code {done.returncode}: {done.stderr}")
            report = json.loads(Path(folder, "out", "report.json").read_text())
        before.append(score(report["before"], labels))
        after.append(score(report["after"], labels))
        folding.append(report["jacobian"]["folding_percent"])
        seconds.append(report["seconds"]["total"])
        print(f"{row.get('id', row['fixed'])}: {before[-1]:.3f} -> {after[-1]:.3f}, {seconds[-1]:.1f} s", file=sys.stderr)
    numbers = (statistics.mean(before), statistics.mean(after), statistics.mean(folding), statistics.median(seconds))
    print(f"| {arguments.pairs.parent.name}, {len(rows)} pairs | {numbers[0]:.3f} | {numbers[1]:.3f} | {numbers[2]:.4f} % | {numbers[3]:.1f} |")


if __name__ == "__main__":
    main()
