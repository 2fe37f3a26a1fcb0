"""The options that several verbs share, each declared once, in groups that are dataclasses; and what they ask of the parameters."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from regtool.cli.console import logs
from regtool.cli.grouped import Sets, given_parameters
from regtool.config.choices import DEVICE, LARGEST_SEED, MOST_THREADS, NO_MODEL, Alignment, ImageFormat, TimeMode, similarities
from regtool.errors import UsageError, expected_one_of

IMAGES, METHOD, OUTPUT, EXTRA, RUN = "Images", "Method", "Output", "Evaluation", "Run"


def choice(names: Any, option: str, *, help: str, panel: str | None = None, show_default: bool = False) -> Any:
    """An option that takes one of some names, in upper or lower case. names: a `Literal`, or the names themselves."""
    known = [str(name) for name in (get_args(names) or names)]

    def parse(text: str) -> str:
        if text.lower() not in known:
            raise UsageError(f"{option} {text}: {expected_one_of(text, known)}", tip=f"for example {option} {known[-1]}")
        return text.lower()

    return typer.Option(option, help=help, metavar="|".join(known), parser=parse, rich_help_panel=panel, show_default=show_default)


def _device(name: str) -> str:
    if not DEVICE.fullmatch(name.lower()):
        raise UsageError(f"--device {name}: unknown device", tip="expected auto, cpu, cuda, cuda:N or mps")
    return name.lower()


def _positive(gigabytes: float | None) -> float | None:
    if gigabytes is not None and not 0 < gigabytes < math.inf:
        raise UsageError(f"--max-memory {gigabytes:g}: expected a number above zero", tip="--max-memory 8 allows 8 GB")
    return gigabytes


def _iterations(refine: str) -> int | None:
    """None where the parameter file or the default decides."""
    if refine.lower() == "auto":
        return None
    if refine.lower() != "none" and not refine.isdecimal():
        raise UsageError(f"--refine {refine}: expected auto, none or a number of steps", tip="for example --refine 100")
    return 0 if refine.lower() == "none" else int(refine)


def _optional(*names: str, help: str, panel: str, metavar: str | None = None, **more: Any) -> Any:
    """An option that says nothing where it is left out."""
    return typer.Option(*names, help=help, metavar=metavar, rich_help_panel=panel, show_default=False, **more)


# Options that stand alone.

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing result.", rich_help_panel=OUTPUT)]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout instead of the table.", rich_help_panel=OUTPUT)]
FixHeader = Annotated[
    bool,
    typer.Option("--fix-header", help="Repair directions that are no rotation and spacings at or below zero, and say so.", rich_help_panel=IMAGES),
]
Set = Annotated[list[str] | None, _optional("--set", help="One parameter; may be repeated.", panel=METHOD, metavar="SECTION.KEY=VALUE")]


# What to register.


@dataclass(frozen=True)
class PairOptions:
    """The two images."""

    fixed: Annotated[Path | None, typer.Argument(help="The image that stays: a file, or a folder with a DICOM series.", show_default=False)] = None
    moving: Annotated[Path | None, typer.Argument(help="The image that is brought onto it.", show_default=False)] = None
    fixed_option: Annotated[Path | None, _optional("--fixed", "-f", help="The same as FIXED.", panel=IMAGES)] = None
    moving_option: Annotated[Path | None, _optional("--moving", help="The same as MOVING.", panel=IMAGES)] = None

    @property
    def only(self) -> Path | None:
        """The first argument, where there is nothing but it: a list of pairs, perhaps."""
        return self.fixed if (self.moving, self.fixed_option, self.moving_option) == (None, None, None) else None

    def paths(self) -> tuple[Path, Path]:
        """FIXED MOVING, or --fixed and --moving; UsageError where one is missing or named twice."""
        fixed, moving = self.fixed, self.moving
        if self.fixed_option is not None and moving is None and fixed is not None and self.moving_option is None:
            fixed, moving = None, fixed  # `--fixed F M`
        found = []
        for name, one, other in (("fixed", fixed, self.fixed_option), ("moving", moving, self.moving_option)):
            if one is not None and other is not None:
                raise UsageError(f"the {name} image is named twice: {one} and {other}", tip="name it once")
            path = one or other
            if path is None:
                raise UsageError(f"the {name} image is missing", tip="two images follow the verb: FIXED MOVING, or --fixed FIXED --moving MOVING")
            found.append(path)
        return found[0], found[1]


@dataclass(frozen=True)
class MaskOptions:
    """Where the images count."""

    fixed_mask: Annotated[Path | None, _optional(help="Where the fixed image counts: above zero.", panel=METHOD, metavar="FILE")] = None
    moving_mask: Annotated[Path | None, _optional(help="Where the moving image counts: above zero.", panel=METHOD, metavar="FILE")] = None


@dataclass(frozen=True)
class AnnotationOptions:
    """Labels and landmarks, to evaluate with."""

    fixed_labels: Annotated[Path | None, _optional(help="Label map of the fixed image: Dice before and after is reported.", panel=EXTRA)] = None
    moving_labels: Annotated[Path | None, _optional(help="Label map of the moving image.", panel=EXTRA)] = None
    fixed_landmarks: Annotated[
        Path | None, _optional(help="Points in the fixed image (mm LPS): the target registration error is reported.", panel=EXTRA)
    ] = None
    moving_landmarks: Annotated[Path | None, _optional(help="The same points in the moving image.", panel=EXTRA)] = None


@dataclass(frozen=True)
class ImageOptions(AnnotationOptions, MaskOptions, PairOptions):
    """What to register: two images and all that is known of them."""

    fix_header: FixHeader = False

    @property
    def known(self) -> dict[str, Any]:
        """Masks, labels, landmarks and how to read headers, as a request takes them."""
        mine = {f.name for f in fields(self)} - {f.name for f in fields(PairOptions)}
        return {name: getattr(self, name) for name in mine}


# How.


@dataclass(frozen=True)
class MethodOptions:
    """The method, and parameters one by one or in a file."""

    method: Annotated[
        str | None, _optional("--method", "-m", help="Registration method; `regtool methods` lists them.", panel=METHOD), Sets("method")
    ] = None
    parameter_file: Annotated[Path | None, _optional("--parameters", "-p", help="Parameter file.", panel=METHOD, metavar="FILE.toml")] = None
    overrides: Set = None


@dataclass(frozen=True, kw_only=True)
class RegistrationOptions:
    """Model, initialization, similarity and refinement."""

    model: Annotated[
        str | None,
        _optional(
            help="Trained model, a name or a file. Left out: the one that comes with regtool for the method named by -m, where there is one. none: "
            "the method learns on the pair itself.",
            panel=METHOD,
            metavar="NAME|FILE",
        ),
        Sets("run.model"),
    ] = None
    align: Annotated[
        Alignment | None,
        choice(
            Alignment,
            "--align",
            help="First bring the images together: by their centres, their centres of mass, a rigid or an affine map.",
            panel=METHOD,
        ),
        Sets("align.method"),
    ] = None
    initial_transform: Annotated[
        Path | None,
        _optional(help="Transform from fixed to moving to start from (ITK, ANTs, elastix, a field).", panel=METHOD, metavar="FILE"),
        Sets("run.initial_transform", lambda path: str(path.resolve())),
    ] = None
    similarity: Annotated[
        str | None, choice(("auto", *similarities()), "--similarity", help="What a good match is.", panel=METHOD), Sets("metric.name")
    ] = None
    refine: Annotated[
        str | None,
        _optional(
            help="Steps at each resolution of optimising the displacement itself, after the network or without one; none, auto (60) or a number.",
            panel=METHOD,
            metavar="auto|none|N",
        ),
        Sets("refine.iterations", _iterations),
    ] = None
    symmetric: Annotated[
        bool | None,
        _optional(
            "--symmetric/--one-way",
            help="Register both ways at once when refining: images exchanged give the inverse field. Writes the inverse too.",
            panel=METHOD,
        ),
        Sets("refine.symmetric"),
    ] = None


@dataclass(frozen=True)
class SeriesOptions(RegistrationOptions):
    """The same, and what becomes of a moving image over time."""

    time: Annotated[
        TimeMode | None,
        choice(TimeMode, "--time", help="4-D moving image: a transform for each time point, or one for all.", panel=METHOD),
        Sets("run.time"),
    ] = None


# Where and what to write, and where to compute.


@dataclass(frozen=True)
class OutputOptions:
    """What is written of a registration, and where."""

    output: Annotated[
        Path | None, _optional("--output", "-o", help="Folder to write. Left out: MOVING_to_FIXED, here.", panel=OUTPUT, metavar="DIR")
    ] = None
    inverse: Annotated[
        bool | None,
        _optional("--inverse/--no-inverse", help="Write the inverse displacement too, with its residual.", panel=OUTPUT),
        Sets("run.inverse"),
    ] = None
    format: Annotated[ImageFormat | None, choice(ImageFormat, "--format", help="Of the images written.", panel=OUTPUT), Sets("run.format")] = None
    qc: Annotated[bool | None, _optional("--qc/--no-qc", help="Write the quality page.", panel=OUTPUT), Sets("run.qc")] = None


@dataclass(frozen=True)
class ComputeOptions:
    """Where to compute."""

    device: Annotated[
        str | None, _optional("--device", help="auto, cpu, cuda, cuda:N or mps.", panel=RUN, metavar="NAME", parser=_device), Sets("run.device")
    ] = None
    threads: Annotated[
        int | None, _optional("--threads", help="CPU threads; left out: all cores.", panel=RUN, min=1, max=MOST_THREADS), Sets("run.threads")
    ] = None


@dataclass(frozen=True)
class RunOptions(ComputeOptions):
    """The same, memory and random numbers."""

    max_memory: Annotated[
        float | None,
        _optional(help="GB that may be used; the network grid is coarsened to fit.", panel=RUN, metavar="GB", callback=_positive),
        Sets("run.max_memory_gb"),
    ] = None
    seed: Annotated[int | None, _optional(help="Of every random number.", panel=RUN, min=0, max=LARGEST_SEED), Sets("run.seed")] = None


@dataclass(frozen=True)
class ReportOptions:
    """How the verb tells of its work."""

    as_json: Json = False
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Errors only on stderr.", rich_help_panel=OUTPUT)] = False
    verbose: Annotated[int, typer.Option("--verbose", "-v", count=True, help="More on stderr; twice for everything.", rich_help_panel=OUTPUT)] = 0

    def start_logs(self, at_least: int = 0) -> None:
        """Regtool's log goes to stderr from now on. at_least: how much of it, but for --quiet; 1 tells what happens."""
        logs(-1 if self.quiet else max(self.verbose, at_least))


@dataclass(frozen=True)
class ResultOptions(ReportOptions):
    """The same, of a verb that writes files."""

    overwrite: Overwrite = False


def command_line() -> str:
    """The words that started this process, for the report."""
    return shlex.join(["regtool", *sys.argv[1:]])


def overrides_of(settings: Iterable[str] | None, *groups: object) -> dict[str, Any]:
    """What `--set` and the options in the groups ask of the parameters, as `{"section": {"key": value}}`; an option wins over `--set`.

    ParameterError, with the words that were given, for what no parameter file can make right.
    """
    from regtool.config.resolve import check_overrides
    from regtool.config.toml import merged, nested, parse_override

    given = [(f"--set {text}", *parse_override(text)) for text in settings or ()]
    given += [found for group in groups for found in given_parameters(group)]
    for said, _, value in given:
        if isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value):  # bytes of a file name that are no UTF-8
            raise UsageError(f"{said}: this name is no UTF-8 text, as a parameter file is", tip="rename the file")
    overrides = merged(*(nested(key, value) for _, key, value in given))
    check_overrides(overrides, {key: said for said, key, _ in given})
    return overrides


def registration_overrides(
    method: MethodOptions, registration: RegistrationOptions, output: OutputOptions, run: RunOptions, learns: bool = False
) -> dict[str, Any]:
    """`overrides_of` a registration. learns: a network that has a model learns too, so what it learns by is told by --similarity as well."""
    from regtool.config.toml import merged

    derived: dict[str, Any] = {}
    if registration.similarity not in (None, "auto") and (learns or registration.model in (None, NO_MODEL)):
        derived["training_similarity"] = {"name": registration.similarity}
    if registration.symmetric and output.inverse is None:
        derived["run"] = {"inverse": True}
    return merged(overrides_of(method.overrides, method, registration, output, run), derived)
