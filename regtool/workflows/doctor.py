"""`regtool doctor`: looks at a pair before it is registered, and says in words what is wrong and what to do."""

from __future__ import annotations

import contextlib
import math
import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from regtool.config.registration import Align
from regtool.config.schema import Grid as GridParameters
from regtool.config.schema import Preprocess
from regtool.errors import GeometryError, InputError
from regtool.geometry.grid import Grid
from regtool.geometry.images import Image
from regtool.geometry.sampling import grid_points
from regtool.geometry.transforms import Affine, Transform
from regtool.io.images import read_facts, read_image
from regtool.preprocessing.intensity import one_channel
from regtool.preprocessing.pair import image_on_grid, prepare
from regtool.preprocessing.resolution import network_grid
from regtool.registration.initialization import Alignment, align
from regtool.runtime import gathered_warnings

VOXELS = 100_000  # for the joint histogram
BINS = 32
FEW = 100  # voxels in common below which no relation of intensities is worth a number
OBLIQUE_DEGREES = 1.0
THICK = 3.0  # ratio of the largest to the smallest spacing
LARGE = 50_000_000  # voxels

T = TypeVar("T")


@dataclass(frozen=True)
class Finding:
    """level: error (cannot be registered as it is), warning, or note; about: fixed, moving or pair."""

    level: str
    about: str
    what: str
    advice: str = ""


@dataclass(kw_only=True)
class Diagnosis:
    """images, pair: facts with units in the names; command: what to run, None where the pair cannot be registered."""

    images: dict[str, dict[str, Any]] = field(default_factory=dict)
    pair: dict[str, Any] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    command: str | None = None
    unreadable: bool = False

    def as_dict(self) -> dict[str, Any]:
        """For `--json`. status: ok, attention (a warning or error was found) or unreadable."""
        serious = any(f.level != "note" for f in self.findings)
        status = "unreadable" if self.unreadable else "attention" if serious else "ok"
        findings = [asdict(f) for f in self.findings]
        return {"status": status, **self.images, "pair": self.pair, "findings": findings, "command": self.command}

    def table(self) -> list[tuple[str, str]]:
        """For the terminal: facts, then findings, then the command."""
        rows = [row for role, facts in self.images.items() for row in _image_rows(role, facts)]
        rows += [(key.replace("_", " "), _shown(value)) for key, value in self.pair.items()]
        rows += [(f"{f.level}, {f.about}", f"{f.what}. {f.advice[0].upper()}{f.advice[1:]}" if f.advice else f.what) for f in self.findings]
        return [*rows, ("run", self.command)] if self.command else rows


def doctor(fixed: Path, moving: Path) -> Diagnosis:
    """Facts, findings and one suggested command for a pair of files. Broken headers and unreadable files become findings, not exceptions."""
    out = Diagnosis()
    paths = {"fixed": fixed, "moving": moving}
    images = {role: image for role, path in paths.items() if (image := _examined(role, path, out)) is not None}
    if len(images) < len(paths):
        out.unreadable = True
        return out
    if any(_constant(image) for image in images.values()):
        return out
    a, b = images["fixed"].grid, images["moving"].grid
    if a.ndim != b.ndim:
        advice = "cut the matching slice out of the volume, or name the volume on both sides"
        out.findings.append(
            Finding("error", "pair", f"the fixed image is {a.ndim}-D, the moving image {b.ndim}-D: they cannot be registered", advice)
        )
        return out
    out.pair = _placed(a, b)
    target, source = (one_channel(images[role], Preprocess()) for role in ("fixed", "moving"))
    found = align(target, source, Align(), Transform.identity(a.ndim))
    out.pair["intensities_as_headers_say"] = _relation(images["fixed"], images["moving"], Affine.identity(a.ndim))
    if found.name != "none":
        out.pair[f"intensities_after_align_{found.name}"] = _relation(images["fixed"], images["moving"], found.affine)
    _judge_pair(out, a, b, found)
    options = ["--fix-header"] if any("--fix-header" in f.advice for f in out.findings) else []
    options += ["--align", found.name] if found.name != "none" else []
    out.command = shlex.join(["regtool", "register", str(fixed), str(moving), *options])
    return out


def _examined(role: str, path: Path, out: Diagnosis) -> Image | None:
    """One image, its facts and its findings; None where nothing can be read."""
    with gathered_warnings() as warnings:
        try:
            image = _or_repaired(lambda repair: read_image(path, repair), role, out)
            facts = read_facts(path)
        except (InputError, MemoryError) as error:
            out.images[role] = {"path": str(path)}
            out.findings.append(Finding("error", role, str(error) or "the image does not fit into memory", getattr(error, "tip", None) or ""))
            return None
    out.findings += [Finding("warning", role, text) for text in warnings]
    grid = image.grid
    quantiles = np.percentile(_sample(image.data), (0, 1, 50, 99, 100))
    out.images[role] = {
        "path": str(path),
        "size": list(grid.size),
        "spacing_mm": list(grid.spacing),
        "origin_mm": list(grid.origin),
        "extent_mm": list(grid.extent),
        "orientation": grid.orientation() if grid.ndim == Grid.MAX_DIMENSION else "in plane",
        "oblique_degrees": oblique_degrees(grid),
        "pixel": facts.pixel,
        "channels": image.data.shape[0],
        "intensity": dict(zip(("min", "p1", "median", "p99", "max"), (float(q) for q in quantiles), strict=True)),
    }
    _judge_image(role, image, facts.size, out)
    return image


def _or_repaired(read: Callable[[bool], T], role: str, out: Diagnosis) -> T:
    """As the file stands, or else with its header repaired, which is a finding."""
    try:
        return read(False)
    except GeometryError as error:
        with contextlib.suppress(GeometryError):
            repaired = read(True)
            out.findings.append(
                Finding("error", role, error.what, "--fix-header repairs it; check afterwards that left and right are where they belong")
            )
            return repaired
        raise


def oblique_degrees(grid: Grid) -> float:
    """Largest angle between an image axis and the nearest patient axis."""
    cosines = np.clip(np.abs(grid.rotation).max(axis=0), 0, 1)
    return float(np.degrees(np.arccos(cosines)).max())


def _judge_image(role: str, image: Image, file_size: tuple[int, ...], out: Diagnosis) -> None:
    """Findings that one image gives alone."""

    def note(what: str, advice: str = "", level: str = "note") -> None:
        out.findings.append(Finding(level, role, what, advice))

    grid = image.grid
    if len([n for n in file_size if n > 1]) < len(file_size):
        note(f"the file has axes of length 1 (size {_shown(list(file_size))}); it is used as a {grid.ndim}-D image")
    if image.time is not None:
        frames = image.data.shape[0]
        how = "its mean over time is the fixed image" if role == "fixed" else "each time point gets its own transform; --time one makes one for all"
        note(f"a time series of {frames} points", how)
    if not any(grid.origin) and np.array_equal(grid.rotation, np.eye(grid.ndim)):
        lost = "; with spacing 1, too, the format or an export may have lost the geometry" if set(grid.spacing) == {1.0} else ""
        note(f"the header says nothing about the patient: origin 0, axis-aligned{lost}", "left and right cannot be told from it")
    if oblique_degrees(grid) > OBLIQUE_DEGREES:
        note(f"the axes are oblique by {oblique_degrees(grid):.1f} degrees", "no matter for regtool; ITK's own Jacobian filter would be wrong here")
    if max(grid.spacing) > THICK * min(grid.spacing):
        note(
            f"thick slices: {max(grid.spacing):.3g} mm against {min(grid.spacing):.3g} mm in the plane",
            "motion across the slices is found less exactly",
        )
    if grid.voxels > LARGE:
        note(f"{grid.voxels / 1e6:.0f} million voxels", "the network grid is coarsened to fit the memory; --max-memory GB sets the limit")
    if _constant(image):
        note("the image is constant: there is nothing to match", "check how it was made", level="error")


def _constant(image: Image) -> bool:
    return not bool((image.data != image.data.flatten()[0]).any())


def _placed(fixed: Grid, moving: Grid) -> dict[str, Any]:
    """How the two blocks of space lie, as the headers say."""
    volume = [math.prod(g.spacing) ** (1 / g.ndim) for g in (fixed, moving)]
    return {
        "overlap_percent": fixed.overlap_percent(moving),
        "distance_of_centres_mm": float(np.linalg.norm(moving.centre - fixed.centre)),
        "spacing_ratio_moving_to_fixed": volume[1] / volume[0],
        "extent_ratio_moving_to_fixed": (math.prod(moving.extent) / math.prod(fixed.extent)) ** (1 / fixed.ndim),
    }


def _relation(fixed: Image, moving: Image, alignment: Affine) -> dict[str, float]:
    """Correlation in [-1, 1] and normalised mutual information in [1, 2] over the space in common; empty where that is hardly any."""
    scale = Preprocess(intensity="percentile", percentiles=(1.0, 99.0))
    grid = network_grid(fixed.grid, GridParameters(), VOXELS)
    transform = Transform((alignment,))
    common = torch.cat([torch.as_tensor(moving.grid.contains(points.numpy())) for _, points in grid_points(grid, transform)])
    if int(common.sum()) < FEW:
        return {}
    sides = ((fixed, Transform.identity(grid.ndim)), (moving, transform))
    seen = (image_on_grid(prepare(one_channel(image, scale), grid, scale), through, grid) for image, through in sides)
    a, b = (tensor.flatten()[common].double().numpy() for tensor in seen)
    if a.std() == 0 or b.std() == 0:
        return {}
    joint = np.histogram2d(a, b, bins=BINS, range=((0, 1), (0, 1)))[0]
    p = joint / joint.sum()
    together = _entropy(p)
    mutual = (_entropy(p.sum(axis=0)) + _entropy(p.sum(axis=1))) / together if together > 0 else 1.0
    return {"correlation": float(np.corrcoef(a, b)[0, 1]), "normalised_mutual_information": mutual}


def _judge_pair(out: Diagnosis, fixed: Grid, moving: Grid, found: Alignment) -> None:
    """Findings that only the two images together give."""

    def note(level: str, what: str, advice: str) -> None:
        out.findings.append(Finding(level, "pair", what, advice))

    overlap, distance, ratio = (out.pair[k] for k in ("overlap_percent", "distance_of_centres_mm", "spacing_ratio_moving_to_fixed"))
    if overlap == 0:
        note(
            "warning",
            f"by their headers the images do not overlap; their centres are {distance:.0f} mm apart",
            "only an alignment can bring them together: --align auto, the default, or affine",
        )
    elif overlap < 50:
        note(
            "warning",
            f"only {overlap:.0f} % of the fixed image lies inside the moving one",
            "what lies outside has nothing to match and is extrapolated smoothly",
        )
    if found.name != "none":
        gain = f"mutual information {found.similarity['none']:.3f} as the headers say, {found.similarity[found.name]:.3f} with it"
        note("note", f"an alignment ({found.name}) brings the images closer ({gain})", f"--align {found.name} does it; auto, the default, does too")
    if fixed.orientation() != moving.orientation():
        note("note", f"the axes run differently ({fixed.orientation()} and {moving.orientation()})", "no matter: all is done in physical space")
    if not 1 / THICK < ratio < THICK:
        note("note", f"moving voxels are {ratio:.2g} times as wide as fixed ones", "the result has the detail of the coarser one")
    relation: dict[str, float] = next((out.pair[k] for k in reversed(out.pair) if k.startswith("intensities")), {})
    correlation = relation.get("correlation")
    if correlation is not None and correlation < 0.3:
        mutual = relation["normalised_mutual_information"]
        note(
            "warning",
            f"intensities hardly correlate ({correlation:.2f}; normalised mutual information {mutual:.2f})",
            "either the contrast differs, which --similarity auto, the default, sees and ncc and mse do not survive, or the images are far apart "
            "or not of the same body part: look at qc.html",
        )


def _image_rows(role: str, facts: dict[str, Any]) -> list[tuple[str, str]]:
    """The facts of one image in four lines."""
    rows = [(role, facts["path"])]
    if "size" in facts:
        oblique = f", oblique by {facts['oblique_degrees']:.1f} degrees" if facts["oblique_degrees"] > OBLIQUE_DEGREES else ""
        rows += [
            (f"{role} grid", f"{_shown(facts['size'])} voxels of {_shown(facts['spacing_mm'])} mm, {facts['orientation']}{oblique}"),
            (f"{role} place", f"origin ({_shown(facts['origin_mm']).replace(' x ', ', ')}) mm, extent {_shown(facts['extent_mm'])} mm"),
            (f"{role} values", f"{facts['pixel']}, {facts['channels']} channel{'s' if facts['channels'] > 1 else ''}: {_shown(facts['intensity'])}"),
        ]
    return rows


def _entropy(p: np.ndarray) -> float:
    """Nats."""
    return float(-(p[p > 0] * np.log(p[p > 0])).sum())


def _sample(data: torch.Tensor) -> np.ndarray:
    """At most a few million values, with the extremes."""
    flat = data.flatten()
    return np.concatenate([flat[:: max(1, len(flat) // 2_000_000)].numpy(), [float(flat.min()), float(flat.max())]])


def _shown(value: object) -> str:
    """Short and readable."""
    if isinstance(value, dict):
        return ", ".join(f"{k.replace('_', ' ')} {_shown(v)}" for k, v in value.items()) or "too little in common to tell"
    if isinstance(value, list):
        return " x ".join(_shown(v) for v in value)
    return f"{value:.5g}" if isinstance(value, float) else str(value)
