"""Registers all the sets that docs/results.md speaks of with the installed command, one pair at a time, and writes the tables.

    python examples/benchmarks/everything.py DATA --results FILE.json [--methods pyramid,... --every 4] [--only NAME,...] [--write docs/results.md]

DATA: the folder with the sets; one that is not there is left out. --methods: `default` is `regtool register FIXED MOVING` and nothing else; a
method is run twice, its network alone (`-m METHOD --refine none`) and refined. --every 4 takes every fourth pair of a set. FILE.json keeps each row
by set, method and stage: one that is measured again replaces the old one, and without anything to measure (`--methods none`) the tables are made from
it. What comes after `--` goes to `regtool register`.

Dice: labels carried with the nearest neighbour, mean over the labels, or those that the set counts, then over pairs. Landmarks: mean distance, mm.
Known fields: T2 or FLAIR of a head is moved by a cubic B-spline through random knots 40 mm apart, largest displacement 5, 10 or 20 mm, and
registered to T1; the error |u(x) + d(x + u(x))| is taken over the voxels of T1 above their mean. Native scans: the error against the affine maps that
come with them, over the voxels of the fixed scan above their mean. Seconds are those of the whole command, the median over the pairs; beside them
those of the registration alone (alignment, network, refining, warping), which is what other tools' figures count.
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import known
import numpy as np
import SimpleITK as sitk
from sets import EXTRAS, score

START, END = "<!-- everything.py: from here -->", "<!-- everything.py: to here -->"
REGISTERING = ("align", "network", "refine", "warp")  # of `seconds` in a report
Scores = tuple[float, float, float | None]  # before, after, 95th percentile after
Scorer = Callable[[Path], Scores]


@dataclass(frozen=True)
class Case:
    """One pair. extras: options of `register`; scored: from the folder that it wrote, None for its report's own Dice or landmarks."""

    fixed: Path
    moving: Path
    extras: tuple[str, ...] = ()
    scored: Scorer | None = None


@dataclass(frozen=True)
class Set:
    """pairs: made when they are wanted, with a folder to write to; needs: files below DATA; best: the best of other tools on the same pairs."""

    title: str
    metric: str
    needs: tuple[str, ...]
    pairs: Callable[[Path, Path], list[Case]]
    best: str = ""
    labels: str | None = None


def listed(
    name: str, data: Path, _: Path, every: int = 1, first: int | None = None, *, more: str | None = None, masks: tuple[str, ...] = ()
) -> list[Case]:
    """The rows of one list of pairs, or of two; of its masks those that are named."""
    cases = []
    for path in [data / x for x in (name, more) if x is not None]:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))[::every][:first]
        for row in rows:
            extras = [part for k in (*EXTRAS, *masks) if row.get(k) for part in (f"--{k.replace('_', '-')}", str(path.parent / row[k]))]
            cases.append(Case(path.parent / row["fixed"], path.parent / row["moving"], tuple(extras)))
    return cases


def consecutive(name: str, data: Path, _: Path) -> list[Case]:
    """Each subject's image onto that of the one before, the first onto the last."""
    images = sorted((data / name / "images").iterdir())
    cases = []
    for fixed, moving in zip(images, [*images[1:], images[0]], strict=True):
        labels = [str(data / name / "labels" / image.name) for image in (fixed, moving)]
        cases.append(Case(fixed, moving, ("--fixed-labels", labels[0], "--moving-labels", labels[1])))
    return cases


def moved(source: str, amplitude: float, seeds: int, data: Path, scratch: Path) -> list[Case]:
    """T1 and `source` of one head, moved by known fields."""
    folder = data / "brain3d_multimodal_mni" / "patient07"
    fixed, cases = folder / "T1.nii.gz", []
    for seed in range(1, seeds + 1):
        field = known.random_field(sitk.ReadImage(str(fixed), sitk.sitkFloat32), amplitude, seed)
        path = scratch / f"{source}_{amplitude:g}_{seed}.nii.gz"
        known.moved(folder / f"{source}.nii.gz", fixed, field, path)

        def scored(out: Path, field: sitk.Image = field) -> Scores:
            return summed(*known.errors_against_field(fixed, field, out / "displacement.nii.gz"))

        cases.append(Case(fixed, path, (), scored))
    return cases


def implants(data: Path, scratch: Path) -> list[Case]:
    """T1 and T2 of one head, moved by a known field, onto T1 with three bright balls of 28 mm in it, which a mask leaves out."""
    t1 = data / "brain3d_multimodal_mni" / "patient07" / "T1.nii.gz"
    image = sitk.ReadImage(str(t1), sitk.sitkFloat32)
    values = sitk.GetArrayFromImage(image)
    z, y, x = np.indices(values.shape)
    balls = [(z - c) ** 2 + (y - b) ** 2 + (x - a) ** 2 < 14**2 for a, b, c in ((60, 110, 90), (120, 120, 70), (110, 80, 110))]
    hidden = np.logical_or.reduce(balls)
    fixed, mask = scratch / "implants.nii.gz", scratch / "implants_mask.nii.gz"
    for path, data_there in ((fixed, np.where(hidden, 3 * np.percentile(values, 99), values)), (mask, (~hidden).astype(np.uint8))):
        one = sitk.GetImageFromArray(data_there)
        one.CopyInformation(image)
        sitk.WriteImage(one, str(path))
    cases = [case for source in ("T1", "T2") for case in moved(source, 10, 1, data, scratch)]
    return [Case(fixed, case.moving, ("--fixed-mask", str(mask)), case.scored) for case in cases]


def visits(data: Path, _: Path) -> list[Case]:
    """FLAIR of the second visit onto that of the first, and back: both are mapped from one common space."""
    folder = data / "brain3d_multimodal_native" / "patient01"
    images = [folder / f"study{k}_FLAIR.nii.gz" for k in (1, 2)]
    maps = [sitk.ReadTransform(str(folder / f"study{k}_FLAIR_to_common_space.txt")) for k in (1, 2)]
    return [
        _given(images[0], images[1], sitk.CompositeTransform([maps[1], maps[0].GetInverse()])),  # the last one is applied first
        _given(images[1], images[0], sitk.CompositeTransform([maps[0], maps[1].GetInverse()])),
    ]


def contrasts(data: Path, _: Path) -> list[Case]:
    """T1 and T2 of each visit onto its FLAIR, on oblique grids of thick slices."""
    folder = data / "brain3d_multimodal_native" / "patient01"
    names = [(f"study{k}_FLAIR.nii.gz", f"study{k}_{m}") for k in (1, 2) for m in ("T1W", "T2W")]
    given = {m: sitk.ReadTransform(str(folder / f"{m}_intrastudy_to_FLAIR.txt")) for _, m in names}
    return [_given(folder / fixed, folder / f"{moving}.nii.gz", given[moving]) for fixed, moving in names]


def _given(fixed: Path, moving: Path, truth: sitk.Transform) -> Case:
    return Case(fixed, moving, (), lambda out: summed(*known.errors_against_map(fixed, truth, out / "displacement.nii.gz")))


def summed(before: np.ndarray, after: np.ndarray) -> Scores:
    """Means, and the 95th percentile after."""
    return float(before.mean()), float(after.mean()), float(np.percentile(after, 95))


def field_set(source: str, amplitude: float, seeds: int, best: str = "") -> Set:
    needs = tuple(f"brain3d_multimodal_mni/patient07/{name}.nii.gz" for name in ("T1", source))
    return Set(f"{source} to T1, known fields of {amplitude:g} mm", "mm", needs, functools.partial(moved, source, amplitude, seeds), best)


NATIVE = "brain3d_multimodal_native/patient01/study1_FLAIR.nii.gz"
SETS = {
    "brain3d": Set(
        "two T1 brains, both directions, 30 structures", "Dice", ("brain3d_pair/pairs.csv",), functools.partial(listed, "brain3d_pair/pairs.csv"),
        "greedy 0.762 in 42 s", "brain3d_pair/evaluated_labels.txt",
    ),
    "lungct": Set(
        "lung CT, headers 35 mm apart, landmarks", "mm", ("lungct_pair/pairs.csv",), functools.partial(listed, "lungct_pair/pairs.csv"),
        "greedy 1.45 mm in 25 s",
    ),
    "lungct_fixed": Set(
        "the same, the fixed lungs marked", "mm", ("lungct_pair/pairs.csv",),
        functools.partial(listed, "lungct_pair/pairs.csv", masks=("fixed_mask",)),
    ),
    "lungct_both": Set(
        "the same, both lungs marked", "mm", ("lungct_pair/pairs.csv",),
        functools.partial(listed, "lungct_pair/pairs.csv", masks=("fixed_mask", "moving_mask")),
    ),
    "hippocampus": Set(
        "hippocampus MR", "Dice", ("hippocampus3d/pairs_test.csv",), functools.partial(listed, "hippocampus3d/pairs_test.csv"),
        "elastix 0.789 in 25 s",
    ),
    "cardiac": Set(
        "cine MR of the heart, 2-D", "Dice", ("cardiac2d/pairs_test.csv",),
        functools.partial(listed, "cardiac2d/pairs_test.csv", every=10, first=24), "elastix 0.914 in 9.7 s",
    ),
    "brain2d": Set(
        "2-D brain slices, each subject to the next", "Dice", ("brain2d_labelled/images",), functools.partial(consecutive, "brain2d_labelled"),
        "ANTs SyNQuick 0.426 in 2.7 s",
    ),
    "prostate": Set(
        "prostate, MR to ultrasound", "Dice", ("prostate_mr_us/pairs_test.csv", "prostate_mr_us/pairs_train.csv"),
        functools.partial(listed, "prostate_mr_us/pairs_test.csv", more="prostate_mr_us/pairs_train.csv"), "elastix 0.321, below the start",
    ),
    "t2_5": field_set("T2", 5, 1),
    "t2_10": field_set("T2", 10, 2, "elastix 0.76 mm in 36 s (first field)"),
    "t2_20": field_set("T2", 20, 2, "elastix 0.87 mm in 44 s (first field)"),
    "flair_10": field_set("FLAIR", 10, 1),
    "implants": Set(
        "T1 and T2 to T1 with three implants, marked, known field of 10 mm", "mm",
        tuple(f"brain3d_multimodal_mni/patient07/{name}.nii.gz" for name in ("T1", "T2")), implants,
    ),
    "visits": Set("FLAIR of two visits, against the given maps", "mm", (NATIVE,), visits),
    "contrasts": Set("T1 and T2 to FLAIR, native grids, against the given maps", "mm", (NATIVE,), contrasts),
}  # fmt: skip


def registered(case: Case, options: list[str], labels: set[str] | None) -> tuple[Scores, dict]:
    """What one command reached, and its report; ends the program where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        command = ["regtool", "register", str(case.fixed), str(case.moving), "-o", str(out), "-q", *case.extras, *options]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
        if done.returncode not in (0, 4):
            sys.exit(f"{' '.join(command)}: exit code {done.returncode}: {done.stderr}")
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
        if case.scored is not None:
            return case.scored(out), report
        p95 = report["after"]["tre_mm"]["p95"] if "tre_mm" in report["after"] else None
        return (score(report["before"], labels), score(report["after"], labels), p95), report


def measured(key: str, cases: list[Case], method: str, refined: bool, options: list[str], labels: set[str] | None) -> dict:
    """A row: one way of registering all pairs of a set."""
    asked = [] if method == "default" else ["-m", method, *([] if refined else ["--refine", "none"])]
    scores, reports = [], []
    for number, case in enumerate(cases, 1):
        found, report = registered(case, [*asked, *options], labels)
        scores.append(found)
        reports.append(report)
        seconds = report["seconds"]["total"]
        print(
            f"{key}, {' '.join(asked) or method}, pair {number} of {len(cases)}: {found[0]:.3f} -> {found[1]:.3f}, {seconds:.1f} s", file=sys.stderr
        )
    before, after, p95 = (statistics.mean(column) if None not in column else None for column in zip(*scores, strict=True))
    return {
        "set": key,
        "method": method,
        "refined": refined,
        "dimension": len(reports[0]["fixed"]["size"]),
        "pairs": len(cases),
        "measure": SETS[key].metric,
        "before": before,
        "after": after,
        "p95": p95,
        "folding_percent": statistics.mean(r["jacobian"]["folding_percent"] for r in reports),
        "seconds": statistics.median(r["seconds"]["total"] for r in reports),
        "alone": statistics.median(sum(r["seconds"].get(stage, 0.0) for stage in REGISTERING) for r in reports),
        "model": reports[0]["model"]["name"],
        "each": [round(after, 4) for _, after, _ in scores],
    }


def tables(rows: list[dict]) -> str:
    """Markdown: what comes without any option, against the best of the others; then every method, alone and refined."""
    order = sorted(rows, key=lambda row: (list(SETS).index(row["set"]), row["method"], row["refined"]))
    own = [row for row in order if row["method"] == "default"]
    lines = [START, ""]
    if own:
        heads = ["set", "pairs", "before", "after", "95 %", "folding", "median seconds", "registration alone", "best of the others"]
        lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for row in own:
            numbers = f"{text(row, 'before')} | {text(row, 'after')} | {text(row, 'p95')} | {row['folding_percent']:.4f} % | {row['seconds']:.1f}"
            numbers += f" | {row['alone']:.1f}"
            lines.append(f"| {SETS[row['set']].title} | {row['pairs']} | {numbers} | {SETS[row['set']].best or '-'} |")
        lines.append("")
    both = {(row["set"], row["method"]): {r["refined"]: r for r in order if (r["set"], r["method"]) == (row["set"], row["method"])} for row in order}
    methods = {key: found for key, found in both.items() if len(found) > 1}
    if methods:
        heads = ["set", "pairs", "weights", "before", "network", "folding", "seconds", "network and refining", "seconds"]
        lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for (key, _), found in methods.items():
            alone, refined = found[False], found[True]
            numbers = f"{text(alone, 'after')} | {alone['folding_percent']:.3f} % | {alone['seconds']:.1f}"
            numbers += f" | {text(refined, 'after')} | {refined['seconds']:.1f}"
            lines.append(f"| {SETS[key].title} | {alone['pairs']} | {alone['model']} | {text(alone, 'before')} | {numbers} |")
        lines.append("")
    return "\n".join([*lines, END])


def text(row: dict, key: str) -> str:
    if row[key] is None:
        return "-"
    return f"{row[key]:.3f}" if row["measure"] == "Dice" else f"{row[key]:.2f} mm"


def put(tables: str, path: Path) -> None:
    """Between the two marks of a page, or at its end."""
    page = path.read_text(encoding="utf-8")
    head, _, rest = page.partition(START)
    tail = rest.partition(END)[2]
    path.write_text(f"{head}{tables}{tail}" if rest else f"{page.rstrip()}\n\n{tables}\n", encoding="utf-8")


def chosen(names: str | None, data: Path) -> Iterator[str]:
    """The sets that are wanted and there."""
    for name in names.split(",") if names else SETS:
        if name not in SETS:
            sys.exit(f"unknown set {name!r}; known: {', '.join(SETS)}")
        absent = [path for path in SETS[name].needs if not (data / path).exists()]
        if absent:
            print(f"{name} is left out: {data} has no {absent[0]}", file=sys.stderr)
        else:
            yield name


def main() -> None:
    own, _, options = " ".join(sys.argv[1:]).partition(" -- ")
    names = "sets:\n" + "\n".join(f"  {name}: {one.title}" for name, one in SETS.items())
    parser = argparse.ArgumentParser(description=__doc__, epilog=names, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--results", type=Path, required=True, help="kept between runs")
    parser.add_argument("--methods", default="default")
    parser.add_argument("--only", help="sets, separated by commas")
    parser.add_argument("--every", type=int, default=1, help="of the pairs of each set")
    parser.add_argument("--write", type=Path, help="a page of Markdown; left out: standard output")
    arguments = parser.parse_args(own.split())
    methods = [m for m in arguments.methods.split(",") if m != "none"]
    results = json.loads(arguments.results.read_text(encoding="utf-8")) if arguments.results.exists() else {}
    for key in chosen(arguments.only, arguments.data) if methods else ():
        with tempfile.TemporaryDirectory() as scratch:
            cases = SETS[key].pairs(arguments.data, Path(scratch))[:: arguments.every]
            labels = set((arguments.data / str(SETS[key].labels)).read_text(encoding="utf-8").split()) if SETS[key].labels else None
            for method, refined in [(m, r) for m in methods for r in ((True,) if m == "default" else (False, True))]:
                row = measured(key, cases, method, refined, options.split(), labels)
                results[f"{key} {method} {'refined' if refined else 'network'}"] = row
                arguments.results.write_text(json.dumps(results, indent=1), encoding="utf-8")
    page = tables(list(results.values()))
    if arguments.write:
        put(page, arguments.write)
    else:
        print(page)


if __name__ == "__main__":
    main()
