"""BIDS: the images of a dataset's subjects, and results named as derivatives (https://bids-specification.readthedocs.io, 1.10)."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from regtool.cohorts.folder import LOGS, PairFolder
from regtool.errors import InputError, UsageError
from regtool.io.files import explained, strict_json, write_text
from regtool.io.formats import stem_of, suffix_of
from regtool.io.images.nifti import FORMAT as NIFTI
from regtool.io.pairs import Entry, Pair, Pairs
from regtool.report.schema import REPORT, RegistrationReport

VERSION = "1.10.0"
LAST = ("space", "res", "den", "label", "desc")  # entities of derivatives, which stand behind those of the image
IGNORED = f"{LOGS}/\ncohort*.html\ncohort.json\nresults.csv\n*_xfm.*\n"  # *_xfm: proposed (BEP014), not yet accepted


@dataclass(frozen=True)
class Name:
    """A BIDS name taken apart. entities: in their order, `sub` first; ending: what BIDS calls the suffix, such as T1w; kind: anat, func, ..."""

    entities: tuple[tuple[str, str], ...]
    ending: str
    kind: str

    def text(self, **more: str) -> str:
        """`sub-01_ses-1_space-MNI_T1w`, `more` behind the entities of the image; `ending` replaces the ending."""
        ending = more.pop("ending", self.ending)
        own = [(key, value) for key, value in self.entities if key not in LAST]
        return "_".join([*(f"{key}-{value}" for key, value in (*own, *more.items())), ending])

    def folder(self) -> Path:
        """`sub-01/ses-1/anat`, relative to the dataset."""
        found = dict(self.entities)
        return Path(*(f"{key}-{found[key]}" for key in ("sub", "ses") if key in found), self.kind)


def find_subjects(dataset: Path, template: Path, ending: str) -> Pairs:
    """Each image `sub-*/[ses-*/]*/sub-*_<ending>.*` of the dataset as moving to the template; ids are their names.

    InputError where the folder or template is missing, no image is found, or the dataset is a derivative of regtool itself.
    """
    if not dataset.is_dir():
        raise InputError(f"{dataset} is no folder", tip="--bids-dir takes the folder that holds sub-01, sub-02, ...")
    if not template.exists():
        raise InputError(f"the template {template} is missing", tip="--template takes the image that all subjects are brought onto")
    found = []
    for path in sorted(p for pattern in ("sub-*/*", "sub-*/ses-*/*") for p in dataset.glob(f"{pattern}/sub-*_{ending}.*")):
        if path.is_file() and suffix_of(path) in NIFTI.suffixes:
            found.append(Entry(id=stem_of(path), image=path))
    if not found:
        there = len(list(dataset.glob("sub-*")))
        raise InputError(f"{dataset}: no sub-*/[ses-*/]anat/*_{ending}.nii[.gz] in {there} subjects", tip="--suffix names another kind, such as T2w")
    names = [entry.id for entry in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"{dataset}: {twice} is there twice, as .nii and as .nii.gz", tip="keep one of them")
    fixed = Entry(id="template", image=template)
    return tuple(Pair(entry.id, fixed, entry) for entry in found)


def derivative_name(pair: Pair) -> Name:
    """The name of the moving image where it is one of BIDS; else the pair's id becomes the subject."""
    stem = stem_of(pair.moving.image)
    *parts, ending = stem.split("_")
    entities = [tuple(part.split("-", 1)) for part in parts]
    if entities and all(len(e) == 2 and e[1].isalnum() for e in entities) and entities[0][0] == "sub" and ending.isalnum():
        kind = pair.moving.image.parent.name
        return Name(tuple((e[0], e[1]) for e in entities), ending, kind if kind in ("anat", "func", "dwi", "perf", "pet", "fmap") else "anat")
    return Name((("sub", label_of(pair.id)),), "T1w" if "t1" in stem.lower() else "T2w" if "t2" in stem.lower() else "image", "anat")


def space_of(fixed: Path) -> str:
    """What the fixed image's space is called: `tpl-MNI152NLin2009cAsym_res-01_T1w` is MNI152NLin2009cAsym, else letters and digits of the name."""
    stem = stem_of(fixed)
    template = re.match(r"tpl-([A-Za-z0-9]+)", stem)
    return template.group(1) if template else label_of(stem)


def label_of(text: str) -> str:
    """Letters and digits alone, as BIDS labels are. UsageError where none is left."""
    found = "".join(c for c in text if c.isascii() and c.isalnum())
    if not found:
        raise UsageError(f"{text!r} holds no letter or digit to make a BIDS label of", tip="give the pairs ids of letters and digits")
    return found


def target_names(pair: Pair) -> dict[str, str]:
    """What the outputs of `register` are called, by their names there without suffixes: paths relative to the dataset, without suffixes."""
    name, space = derivative_name(pair), space_of(pair.fixed.image)
    there, back = {"from": name.ending, "to": space, "mode": "image"}, {"from": space, "to": name.ending, "mode": "image"}
    found = {
        "warped": name.text(space=space),
        "warped_labels": name.text(space=space, ending="dseg"),
        "transform": name.text(**there, ending="xfm"),
        "displacement": name.text(**there, desc="displacement", ending="xfm"),
        "inverse": name.text(**back, desc="displacement", ending="xfm"),
    }
    return {kind: str(name.folder() / text) for kind, text in found.items()}


def export(dataset: Path, pair: PairFolder, names: Mapping[str, str], report: RegistrationReport) -> RegistrationReport:
    """Moves the outputs of a pair to their BIDS names, each with a JSON sidecar; the report with the names from then on.

    The report on disk goes first, so that a pair cut short in between is visibly unfinished.
    """
    outputs: dict[str, str | tuple[str, ...]] = {}
    with explained(dataset):
        (pair.folder / REPORT).unlink(missing_ok=True)
        for kind, name in names.items():
            if kind not in report.outputs:
                continue
            written = report.outputs[kind]
            frames = [written] if isinstance(written, str) else written
            moved = []
            for t, file in enumerate(frames):
                stem = name if len(frames) == 1 else _numbered(name, t)
                target = dataset / f"{stem}{suffix_of(Path(file))}"
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(pair.folder / file, target)
                write_text(dataset / f"{stem}.json", strict_json(_sidecar(kind, pair, report)) + "\n")
                moved.append(os.path.relpath(target, pair.folder))
            outputs[kind] = moved[0] if isinstance(written, str) else tuple(moved)
    return report.model_copy(update={"outputs": report.outputs.model_copy(update=outputs)})


def describe(dataset: Path, source: Path | None) -> None:
    """`dataset_description.json` and `.bidsignore` of the derivative, where there are none yet."""
    generated = {"Name": "regtool", "Version": version("regtool")}
    found: dict[str, Any] = {"Name": "regtool", "BIDSVersion": VERSION, "DatasetType": "derivative", "GeneratedBy": [generated]}
    if source is not None:
        found["SourceDatasets"] = [{"URL": source.resolve().as_uri()}]
    for name, text in (("dataset_description.json", strict_json(found) + "\n"), (".bidsignore", IGNORED)):
        if not (dataset / name).exists():
            write_text(dataset / name, text)


def _numbered(name: str, t: int) -> str:
    """One name for each time point: `..._desc-t003_xfm`."""
    head, _, ending = name.rpartition("_")
    return f"{head}t{t:03d}_{ending}" if "_desc-" in head else f"{head}_desc-t{t:03d}_{ending}"


def _sidecar(kind: str, pair: PairFolder, report: RegistrationReport) -> dict[str, Any]:
    paths = {role: str(path) for role, path in pair.inputs.items()}
    if kind in ("warped", "warped_labels"):
        source = paths["moving_labels" if kind == "warped_labels" else "moving"]
        found: dict[str, Any] = {"SpatialReference": paths["fixed"], "Sources": [source], "Description": "moving image on the grid of the fixed one"}
    else:
        start, end = ("fixed", "moving") if kind == "inverse" else ("moving", "fixed")
        form = "ITK transform" if kind == "transform" else "displacement in mm, LPS"
        text = f"{form}; resamples From onto To, and so maps points of To to points of From"
        found = {"From": paths[start], "To": paths[end], "Sources": [paths["fixed"], paths["moving"]], "Description": text}
    return {**found, "GeneratedBy": {"Name": "regtool", "Version": report.versions["regtool"], "Method": report.method}}
