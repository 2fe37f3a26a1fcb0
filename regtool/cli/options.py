"""Option types that several verbs share."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated

import typer

from regtool.config.choices import DEVICE, LARGEST_SEED, MOST_THREADS, NO_MODEL, Alignment, ImageFormat, TimeMode, similarities
from regtool.errors import UsageError, did_you_mean

IMAGES, METHOD, OUTPUT, EXTRA, RUN = "Images", "Method", "Output", "Evaluation", "Run"

Fixed = Annotated[Path | None, typer.Argument(help="The image that stays: a file, or a folder with a DICOM series.", show_default=False)]
Moving = Annotated[Path | None, typer.Argument(help="The image that is brought onto it.", show_default=False)]
FixedOption = Annotated[Path | None, typer.Option("--fixed", "-f", help="The same as FIXED.", rich_help_panel=IMAGES, show_default=False)]
MovingOption = Annotated[Path | None, typer.Option("--moving", help="The same as MOVING.", rich_help_panel=IMAGES, show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout instead of the table.", rich_help_panel=OUTPUT)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing result.", rich_help_panel=OUTPUT)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Errors only on stderr.", rich_help_panel=OUTPUT)]
Verbose = Annotated[int, typer.Option("--verbose", "-v", count=True, help="More on stderr; twice for everything.", rich_help_panel=OUTPUT)]
FixHeader = Annotated[
    bool,
    typer.Option("--fix-header", help="Repair directions that are no rotation and spacings at or below zero, and say so.", rich_help_panel=IMAGES),
]


def _device(name: str | None) -> str | None:
    if name is not None and not DEVICE.fullmatch(name):
        raise UsageError(f"--device {name}: unknown device", tip="expected auto, cpu, cuda, cuda:N or mps")
    return name


def _similarity(name: str | None) -> str | None:
    known = ["auto", *similarities()]
    if name is not None and name.lower() not in known:
        raise UsageError(f"--similarity {name}: unknown similarity; {did_you_mean(name, known)}", tip=f"expected one of {', '.join(known)}")
    return None if name is None else name.lower()


def _positive(gigabytes: float | None) -> float | None:
    if gigabytes is not None and not 0 < gigabytes < math.inf:
        raise UsageError(f"--max-memory {gigabytes:g}: expected a number above zero", tip="--max-memory 8 allows 8 GB")
    return gigabytes


Device = Annotated[
    str | None,
    typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.", rich_help_panel=RUN, show_default=False, callback=_device),
]
Threads = Annotated[
    int | None,
    typer.Option("--threads", help="CPU threads; left out: all cores.", rich_help_panel=RUN, show_default=False, min=1, max=MOST_THREADS),
]
MaxMemory = Annotated[
    float | None,
    typer.Option(
        "--max-memory",
        help="GB that may be used; the network grid is coarsened to fit.",
        metavar="GB",
        rich_help_panel=RUN,
        show_default=False,
        callback=_positive,
    ),
]
Seed = Annotated[int | None, typer.Option("--seed", help="Of every random number.", rich_help_panel=RUN, show_default=False, min=0, max=LARGEST_SEED)]
ParameterFile = Annotated[
    Path | None, typer.Option("--parameters", "-p", metavar="FILE.toml", help="Parameter file.", rich_help_panel=METHOD, show_default=False)
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="One parameter; may be repeated.", rich_help_panel=METHOD, show_default=False),
]

Method = Annotated[
    str | None,
    typer.Option(
        "--method",
        "-m",
        help="Registration method; `regtool methods` lists them. Left out: no network.",
        rich_help_panel=METHOD,
        show_default=False,
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="Trained model, a name or a file. Left out: the one that comes with regtool for the method named by -m, where there is one. none: the "
        "method learns on the pair itself.",
        metavar="NAME|FILE",
        rich_help_panel=METHOD,
        show_default=False,
    ),
]
Align = Annotated[
    Alignment | None,
    typer.Option(
        "--align",
        help="First bring the images together: by their centres, their centres of mass, a rigid or an affine map.",
        rich_help_panel=METHOD,
        show_default=False,
    ),
]
InitialTransform = Annotated[
    Path | None,
    typer.Option(
        "--initial-transform",
        help="Transform from fixed to moving to start from (ITK, ANTs, elastix, a field).",
        metavar="FILE",
        rich_help_panel=METHOD,
        show_default=False,
    ),
]
Similarity = Annotated[
    str | None,
    typer.Option(
        "--similarity",
        help="What a good match is.",
        metavar="|".join(["auto", *similarities()]),
        callback=_similarity,
        rich_help_panel=METHOD,
        show_default=False,
    ),
]
Refine = Annotated[
    str | None,
    typer.Option(
        "--refine",
        help="Steps at each resolution of optimising the displacement itself, after the network or without one; none, auto (60) or a number.",
        metavar="auto|none|N",
        rich_help_panel=METHOD,
        show_default=False,
    ),
]
Symmetric = Annotated[
    bool | None,
    typer.Option(
        "--symmetric/--one-way",
        help="Register both ways at once when refining: images exchanged give the inverse field. Writes the inverse too.",
        rich_help_panel=METHOD,
        show_default=False,
    ),
]
Inverse = Annotated[
    bool | None,
    typer.Option("--inverse/--no-inverse", help="Write the inverse displacement too, with its residual.", rich_help_panel=OUTPUT, show_default=False),
]
Format = Annotated[ImageFormat | None, typer.Option("--format", help="Of the images written.", rich_help_panel=OUTPUT, show_default=False)]
Time = Annotated[
    TimeMode | None,
    typer.Option("--time", help="4-D moving image: a transform for each time point, or one for all.", rich_help_panel=METHOD, show_default=False),
]
Qc = Annotated[bool | None, typer.Option("--qc/--no-qc", help="Write the quality page.", rich_help_panel=OUTPUT, show_default=False)]

OutputFolder = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", help="Folder to write. Left out: MOVING_to_FIXED, here.", metavar="DIR", rich_help_panel=OUTPUT, show_default=False
    ),
]
FixedMask = Annotated[
    Path | None,
    typer.Option("--fixed-mask", help="Where the fixed image counts: above zero.", metavar="FILE", rich_help_panel=METHOD, show_default=False),
]
MovingMask = Annotated[
    Path | None,
    typer.Option("--moving-mask", help="Where the moving image counts: above zero.", metavar="FILE", rich_help_panel=METHOD, show_default=False),
]
FixedLabels = Annotated[
    Path | None,
    typer.Option(
        "--fixed-labels", help="Label map of the fixed image: Dice before and after is reported.", rich_help_panel=EXTRA, show_default=False
    ),
]
MovingLabels = Annotated[
    Path | None,
    typer.Option("--moving-labels", help="Label map of the moving image; it is warped too.", rich_help_panel=EXTRA, show_default=False),
]
FixedLandmarks = Annotated[
    Path | None,
    typer.Option(
        "--fixed-landmarks",
        help="Points in the fixed image (mm LPS): the target registration error is reported.",
        rich_help_panel=EXTRA,
        show_default=False,
    ),
]
MovingLandmarks = Annotated[
    Path | None, typer.Option("--moving-landmarks", help="The same points in the moving image.", rich_help_panel=EXTRA, show_default=False)
]


def settings(
    method: str | None,
    model: str | None,
    align: str | None,
    initial_transform: Path | None,
    similarity: str | None,
    refine: str | None,
    symmetric: bool | None,
    inverse: bool | None,
    image_format: str | None,
    time: str | None,
    device: str | None,
    threads: int | None,
    max_memory: float | None,
    seed: int | None,
    qc: bool | None,
) -> tuple[str, ...]:
    """The options of a registration as `section.key=value`; those left out leave it to the parameter file."""
    given = {
        "method": method,
        "run.model": model,
        "align.method": align,
        "run.initial_transform": initial_transform.resolve() if initial_transform else None,
        "metric.name": similarity,
        "training_similarity.name": None if model not in (None, NO_MODEL) or similarity == "auto" else similarity,
        "refine.iterations": _iterations(refine),
        "refine.symmetric": symmetric,
        "run.inverse": True if symmetric and inverse is None else inverse,
        "run.format": image_format,
        "run.time": time,
        "run.device": device,
        "run.threads": threads,
        "run.max_memory_gb": max_memory,
        "run.seed": seed,
        "run.qc": qc,
    }
    return tuple(f"{key}={_text(value)}" for key, value in given.items() if value is not None)


def _iterations(refine: str | None) -> int | None:
    """None where the parameter file or the default decides."""
    if refine is None or refine == "auto":
        return None
    if refine != "none" and not refine.isdecimal():
        raise UsageError(f"--refine {refine}: expected auto, none or a number of steps", tip="for example --refine 100")
    return 0 if refine == "none" else int(refine)


def _text(value: object) -> str:
    """A value as TOML."""
    return json.dumps(value if isinstance(value, bool | int | float) else str(value))


def pair(fixed: Path | None, moving: Path | None, fixed_option: Path | None, moving_option: Path | None) -> tuple[Path, Path]:
    """FIXED MOVING, or --fixed and --moving; UsageError where one is missing or named twice."""
    if fixed_option is not None and moving is None and fixed is not None and moving_option is None:
        fixed, moving = None, fixed  # `--fixed F M`
    for name, one, other in (("fixed", fixed, fixed_option), ("moving", moving, moving_option)):
        if one is not None and other is not None:
            raise UsageError(f"the {name} image is named twice: {one} and {other}", tip="name it once")
        if one is None and other is None:
            raise UsageError(f"the {name} image is missing", tip="two images follow the verb: FIXED MOVING, or --fixed FIXED --moving MOVING")
    a, b = fixed or fixed_option, moving or moving_option
    assert a is not None
    assert b is not None
    return a, b
