"""Where the results of registrations lie: in the folders that `register` and `cohort` write, or as a transform file for each pair."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from regtool.errors import InputError, UsageError
from regtool.io.formats import transform_suffixes
from regtool.io.pairs import Pair

log = logging.getLogger("regtool")


def run_names(runs: Sequence[Path]) -> list[str]:
    """The folders' own names where they differ, else their paths. UsageError for one that is named twice, InputError for one that is none."""
    for run in runs:
        if not run.is_dir():
            raise InputError(f"the run {run} is no folder", tip="name the folder that `regtool cohort -o` wrote")
    if len({run.resolve() for run in runs}) < len(runs):
        raise UsageError("a run is named twice", tip="name two different folders to compare them")
    short = [run.resolve().name for run in runs]
    return short if len(set(short)) == len(short) and "before" not in short else [str(run) for run in runs]


def find_result(run: Path, name: str) -> Path | None:
    """What `run` holds for the pair `name`, or None."""
    folder = run / name
    if (folder / "transform.h5").exists() or any(folder.glob("TransformParameters.*.txt")):
        return folder
    return next((path for suffix in transform_suffixes() if (path := run / f"{name}{suffix}").exists()), None)


def pairs_with_results(
    pairs: list[Pair], found: Mapping[str, Mapping[str, Path | None]], runs: Mapping[str, Path], skip: bool
) -> tuple[list[Pair], dict[str, list[str]]]:
    """The pairs that every run has a result for, and the ids that each lacks."""
    missing = {name: [id for id, result in results.items() if result is None] for name, results in found.items()}
    missing = {name: ids for name, ids in missing.items() if ids}
    for name, ids in missing.items():
        if not skip or len(ids) == len(pairs):
            raise InputError(
                f"{len(ids)} of {len(pairs)} pairs have no result in {runs[name]}: {', '.join(ids)}",
                tip="expected a folder or transform file for each id; --skip-missing leaves these pairs out"
                if len(ids) < len(pairs)
                else "expected a folder or transform file for each id, as `regtool cohort -o` writes them",
            )
        log.warning("%d of %d pairs have no result in %s: %s", len(ids), len(pairs), runs[name], ", ".join(ids))
    return [pair for pair in pairs if not any(pair.id in ids for ids in missing.values())], missing


def inverse_beside(transforms: Sequence[object]) -> Path | None:
    """The inverse beside the transform, where there is just one and it is a folder that `register --inverse` wrote."""
    folder = transforms[0] if len(transforms) == 1 else None
    if not isinstance(folder, Path) or not folder.is_dir():
        return None
    return next(iter(sorted(folder.glob("inverse_displacement.*"))), None)
