"""The reports that regtool writes, key by key: of `register` and `finetune-oneshot`, of a failed run, of `evaluate`, `train` and `cohort`.

A record reads like the JSON that it becomes, too: `report["similarity"]["before"]` is `report.similarity.before`. Keys have their units in their
names. A key with the default None is left out where there is nothing to say. No torch in here.
"""

from __future__ import annotations

import json
import math
from collections.abc import KeysView
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializerFunctionWrapHandler, TypeAdapter, WithJsonSchema, model_serializer

from regtool.errors import EXIT_OK, EXIT_QUALITY

FORMAT: Final = 1  # of every report; to be raised where a key is renamed, taken away or means something else
REPORT, FAILED, IDENTITY = "report.json", "failed.json", "cohort.json"

Number = Annotated[
    float,
    BeforeValidator(lambda value: math.nan if value is None else value),
    WithJsonSchema({"type": ["number", "null"], "description": "null is what is no number, or infinite"}),
]
FileNames = str | tuple[str, ...]  # one for each time point of a time series


class Record(BaseModel):
    """Immutable, with no key that is not declared."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_serializer(mode="wrap")
    def _without_missing(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = type(self).model_fields
        return {key: value for key, value in handler(self).items() if value is not None or fields[key].is_required()}

    def keys(self) -> KeysView[str]:
        """Those that the JSON has."""
        fields = type(self).model_fields.items()
        return {key: None for key, info in fields if info.is_required() or getattr(self, key) is not None}.keys()

    def __contains__(self, key: object) -> bool:
        return key in self.keys()

    def __getitem__(self, key: str) -> Any:
        if key not in self.keys():
            raise KeyError(key)
        return getattr(self, key)


class Versioned(Record):
    """What is written to a file, or to standard output with `--json`."""

    model_config = ConfigDict(json_schema_extra=lambda schema: schema["required"].insert(0, "format"))  # the default is for who writes

    format: Literal[1] = Field(FORMAT, description="version of the format")


# --- one pair ----------


class ImageFacts(Record):
    """An image as its header describes it."""

    path: str | None = Field(description="absolute; null for an image in memory")
    sha256: str | None = Field(None, description="of the file, or of all files of a DICOM series")
    size: tuple[int, ...] = Field(description="voxels along x, y[, z]")
    spacing: tuple[float, ...] = Field(description="mm between voxels along x, y[, z]")
    orientation: str = Field(description="anatomical letters of the directions in which x, y[, z] grow, such as LPS")


class ModelFacts(Record):
    """A network's weights."""

    name: str | None = Field(description="of the model; `learned on this pair` for weights that are not kept; null where no network was asked for")
    sha256: str | None = Field(description="of the model file; null without one")


class Outputs(Record):
    """Files of the folder, by kind; a list of names where there is one for each time point."""

    warped: FileNames | None = Field(None, description="the moving image on the grid of the fixed one")
    displacement: FileNames | None = Field(None, description="vectors in mm, LPS, on the grid of the fixed image")
    transform: FileNames | None = Field(None, description="everything composed, for ITK: fixed points to moving ones")
    inverse: FileNames | None = Field(None, description="displacement the other way round, on the grid of the moving image (`--inverse`)")
    warped_labels: FileNames | None = Field(None, description="the moving labels on the grid of the fixed ones")
    model: str | None = Field(None, description="the network that learned on the pair (`finetune-oneshot`)")
    qc: str | None = Field(None, description="the quality page")

    def names(self) -> list[str]:
        """All of them."""
        found = (self[kind] for kind in self.keys())
        return [name for value in found for name in ((value,) if isinstance(value, str) else value)]


class Similarity(Record):
    """On the grid on which stages are compared, where the masks count; higher is better."""

    name: str = Field(description="of the similarity, as in `metric.name`")
    reason: str | None = Field(None, description="why it was taken")
    before: Number = Field(description="with the headers, or through `--initial-transform`")
    after: Number = Field(description="through the transform that was found")


class Jacobian(Record):
    """The determinant of I + du/dx in physical space, over the fixed mask."""

    min: Number = Field(description="least volume ratio, by central differences")
    max: Number = Field(description="largest volume ratio")
    mean: Number = Field(description="mean volume ratio")
    folding_percent: Number = Field(description="voxels where a choice of one-sided differences is at or below zero, per cent")
    sd_log: Number = Field(description="standard deviation of the logarithm, where it has one")


class DisplacementLength(Record):
    """Lengths of the displacement vectors on the fixed grid."""

    mean: Number = Field(description="mm")
    max: Number = Field(description="mm")


class StageFacts(Record):
    """What became of one stage."""

    name: str = Field(description="align, network, network pass 2, ..., refine; deform: why nothing was deformed")
    kept: bool = Field(description="false: rolled back, or not needed")
    seconds: Number = Field(description="of the stage")
    similarity: Number = Field(description="after it")
    reason: str = Field(description="what it chose, or why it was rolled back")


class GridFacts(Record):
    """A grid that a stage worked on."""

    size: tuple[int, ...] = Field(description="voxels along x, y[, z]")
    spacing: tuple[float, ...] = Field(description="mm along x, y[, z]")


class Grids(Record):
    """Left out: there was no such stage."""

    network: GridFacts | None = Field(None, description="of the network")
    refine: GridFacts | None = Field(None, description="of the finest level of refining")


class Seconds(Record):
    """Wall-clock time. Of a pair of a cohort whose process died, the total alone is known."""

    start: Number | None = Field(None, description="before the work began: imports")
    read: Number | None = Field(None, description="reading")
    align: Number | None = Field(None, description="alignment, and the choice of the similarity")
    network: Number | None = Field(None, description="the network")
    refine: Number | None = Field(None, description="refining")
    warp: Number | None = Field(None, description="the dense field and the warped image")
    write: Number | None = Field(None, description="writing, and the inverse")
    qc: Number | None = Field(None, description="the quality page")
    total: Number = Field(description="all of it")


class Check(Record):
    """A threshold of `[qc]` and what it was compared with."""

    name: str = Field(description="as in the parameter file")
    value: Number = Field(description="of the worst time point")
    limit: float = Field(description="as in the parameter file")
    passed: bool = Field(description="whether it was met")


class TimePoint(Record):
    """What was found of one time point of a time series."""

    name: str = Field(description="`time point 0`, ...")
    similarity: Similarity = Field(description="as above")
    jacobian: Jacobian = Field(description="as above")
    displacement_mm: DisplacementLength = Field(description="as above")
    stages: tuple[StageFacts, ...] = Field(description="as above")


class ByLabel(Record):
    """One number a label."""

    mean: Number = Field(description="unweighted mean of the labels")
    labels: dict[str, Number] = Field(description="by label; null: infinite, for a label that is lost")


class TargetRegistrationError(Record):
    """Distances between landmarks, mm."""

    mean: Number = Field(description="of all landmarks")
    median: Number | None = Field(None, description="of all landmarks")
    p95: Number | None = Field(None, description="95th percentile")
    worst30: Number | None = Field(None, description="mean of the worst 30 %")
    each: tuple[Number, ...] = Field(description="one a landmark, in the order of the file")


class Consistency(Record):
    """Distances between points and what becomes of them there and back, mm."""

    mean: Number = Field(description="of all voxels that count")
    p95: Number = Field(description="95th percentile")
    max: Number = Field(description="the largest")


class Scores(Record):
    """How good a state is. What is not given (labels, landmarks, an inverse) leaves its keys out."""

    dice: ByLabel | None = Field(None, description="overlap of the labels")
    hd_mm: ByLabel | None = Field(None, description="Hausdorff distance")
    hd95_mm: ByLabel | None = Field(None, description="the larger of the two directed 95th percentiles of the surface distance")
    hd95_voxels: ByLabel | None = Field(None, description="the same as Learn2Reg has it")
    sd95_mm: ByLabel | None = Field(None, description="95th percentile of both directions pooled")
    assd_mm: ByLabel | None = Field(None, description="average symmetric surface distance")
    masd_mm: ByLabel | None = Field(None, description="mean of the two directed mean surface distances")
    major_axis_difference_mm: ByLabel | None = Field(None, description="of the longest axis of a label")
    minor_axis_difference_mm: ByLabel | None = Field(None, description="of its shortest axis")
    tre_mm: TargetRegistrationError | None = Field(None, description="target registration error of the landmarks")
    ncc: Number | None = Field(None, description="correlation of the intensities")
    lncc: Number | None = Field(None, description="mean squared local correlation")
    mi: Number | None = Field(None, description="mutual information, nats")
    ssim: Number | None = Field(None, description="structural similarity")
    mad_intensity: Number | None = Field(None, description="mean absolute difference of intensities in [0, 1]")
    rmse_percent: Number | None = Field(None, description="root mean squared difference of intensities, per cent of their range")
    jacobian: Jacobian | None = Field(None, description="as in the report of `register`")
    nondiffeomorphic_volume_percent: Number | None = Field(None, description="volume that is turned inside out")
    nmse: Number | None = Field(None, description="of the moving image and itself, warped there and back")
    inverse_consistency_mm: Consistency | None = Field(None, description="of the transform and its inverse")
    sdlogj: Number | None = Field(None, description="as Learn2Reg has it")
    num_foldings: int | None = Field(None, description="as Learn2Reg has it: always 0")
    label_interpolation: str | None = Field(None, description="how labels were carried, in the report of `register`: nearest")


class Change(Record):
    """A number that learning changed."""

    before: Number = Field(description="of the start")
    after: Number = Field(description="of what is kept")


class LearnedFrom(Record):
    """An image that a network learned on."""

    file: str | None = Field(description="name without folders; null for an image in memory")
    sha256: str | None = Field(description="of the file")


class LearnedPair(Record):
    """The pair that a network learned on."""

    fixed: LearnedFrom = Field(description="the fixed image")
    moving: LearnedFrom = Field(description="the moving image")


class Finetuning(Record):
    """How the model of a `finetune-oneshot` came about."""

    parent: ModelFacts | None = Field(description="the model that it started from; null: from scratch")
    pair: LearnedPair = Field(description="what it learned on")
    steps: int = Field(description="that were done")
    best_step: int = Field(description="that led to the weights that are kept; 0: those from before")
    learning_rate: float = Field(description="of Adam")
    loss: Change = Field(description="on the network's grid")
    similarity: Similarity = Field(description="of the network alone, on its grid")
    diverged: bool = Field(description="whether the loss left the finite numbers")


class InverseResidual(Record):
    """How far the inverse misses: |T(T⁻¹(y)) − y| over the voxels of the moving image whose way leads through the fixed one."""

    mean: Number = Field(description="mm")
    max: Number = Field(description="mm")
    covered_percent: Number = Field(description="of the moving image's voxels that count")


class InputStamp(Record):
    """An input file of a pair of a cohort, by which `--resume` knows it again."""

    path: str = Field(description="absolute")
    bytes: int = Field(description="size of the file")
    modified_ns: int = Field(description="when it was last modified, nanoseconds")
    sha256: str = Field(description="of its content")


class RegistrationReport(Versioned):
    """`report.json` of `register`, `finetune-oneshot FIXED MOVING` and each pair of a `cohort`. Of a time series, the first time point's numbers."""

    status: Literal["ok", "qc_failed"] = Field(description="qc_failed: a threshold of `[qc]` was not met")
    method: str = Field(description="of the network; `refine` without one")
    model: ModelFacts = Field(description="the network's weights")
    fixed: ImageFacts = Field(description="the fixed image")
    moving: ImageFacts = Field(description="the moving image")
    outputs: Outputs = Field(description="the files that were written, relative to the folder")
    similarity: Similarity = Field(description="of both images")
    jacobian: Jacobian = Field(description="of the transform: volume change and folding")
    displacement_mm: DisplacementLength = Field(description="of the transform")
    stages: tuple[StageFacts, ...] = Field(description="in their order")
    seconds: Seconds = Field(description="where the time went")
    peak_memory_mb: Number = Field(description="largest resident memory of the process")
    planned_memory_mb: Number = Field(description="what the work was planned to need at most")
    grids: Grids = Field(description="what the stages worked on")
    device: str = Field(description="cpu, cuda:0, mps")
    threads: int = Field(description="of the CPU")
    seed: int = Field(description="as `--seed`")
    versions: dict[str, str] = Field(description="of regtool and of what decides its numbers")
    command: str = Field(description="as it was typed")
    warnings: tuple[str, ...] = Field(description="what was said on the way")
    qc: tuple[Check, ...] = Field(description="the thresholds that were set")
    time_points: tuple[TimePoint, ...] | None = Field(None, description="of a time series, one for each")
    losses: tuple[Number, ...] | None = Field(None, description="of learning on the pair and of refining, step by step")
    before: Scores | None = Field(None, description="with labels or landmarks: with the headers, or through `--initial-transform`")
    after: Scores | None = Field(None, description="with labels or landmarks: through the transform that was found")
    inverse_residual_mm: InverseResidual | tuple[InverseResidual, ...] | None = Field(
        None, description="with `--inverse`; a list where there is one for each time point"
    )
    finetuning: Finetuning | None = Field(None, description="of `finetune-oneshot` alone")
    folder: str | None = Field(None, description="where the outputs are, absolute")
    id: str | None = Field(None, description="of the pair of a cohort")
    inputs: dict[str, InputStamp] | None = Field(None, description="of the pair of a cohort, by role: fixed, moving, fixed_labels, ...")

    @property
    def exit_code(self) -> int:
        """What the command ends with."""
        return EXIT_OK if self.status == "ok" else EXIT_QUALITY


# --- a run that failed ----------


class ErrorFacts(Record):
    """What went wrong."""

    type: str | None = Field(None, description="class of the error; left out where the process died")
    what: str = Field(description="the message")
    tip: str | None = Field(description="what may help")
    exit_code: int = Field(description="of the command")


class FailureReport(Versioned):
    """`failed.json`: what is known of a run that failed. Where the process of a pair of a cohort died, that is little."""

    id: str | None = Field(None, description="of the pair of a cohort")
    status: Literal["failed"] = Field(description="failed")
    error: ErrorFacts = Field(description="what went wrong")
    method: str | None = Field(None, description="as in `report.json`")
    fixed: ImageFacts | None = Field(None, description="as in `report.json`")
    moving: ImageFacts | None = Field(None, description="as in `report.json`")
    outputs: Outputs | None = Field(None, description="the quality page")
    seconds: Seconds = Field(description="as in `report.json`")
    peak_memory_mb: Number | None = Field(None, description="as in `report.json`")
    seed: int | None = Field(None, description="as in `report.json`")
    versions: dict[str, str] | None = Field(None, description="as in `report.json`")
    command: str | None = Field(None, description="as in `report.json`")
    warnings: tuple[str, ...] | None = Field(None, description="as in `report.json`")
    log: str | None = Field(None, description="the last words of a process that died")


# --- evaluate ----------


class EvaluationReport(Versioned):
    """`evaluate FIXED MOVING --json`."""

    fixed: str = Field(description="path of the fixed image, as given")
    moving: str = Field(description="path of the moving image, as given")
    transform: tuple[str, ...] | None = Field(None, description="paths, as given, in the order in which points travel from fixed to moving")
    protocol: Literal["regtool", "learn2reg"] = Field(description="as `--protocol`")
    label_interpolation: str = Field(description="how labels are carried: nearest")
    note: str | None = Field(None, description="what a reader must know to compare the numbers")
    before: Scores = Field(description="as the headers say")
    after: Scores | None = Field(None, description="through the transform")
    seconds: Number = Field(description="of all the work")
    warnings: tuple[str, ...] = Field(description="what was said on the way")


class MeanFacts(Record):
    """A mean over pairs. Of a single pair there is no interval."""

    mean: Number = Field(description="over the pairs")
    low: Number = Field(description="lower end of the 95 % confidence interval (bootstrap)")
    high: Number = Field(description="its upper end")
    sd: Number = Field(description="standard deviation (n - 1)")
    n: int = Field(description="pairs that count")


class Difference(Record):
    """Of a metric of two runs, pair by pair."""

    first: Number = Field(description="mean of the first run")
    second: Number = Field(description="mean of the second run")
    difference: MeanFacts = Field(description="second minus first")
    p: Number = Field(description="two-sided Wilcoxon signed-rank test")


class Comparison(Record):
    """A run against the first one."""

    first: str = Field(description="name of the first run")
    second: str = Field(description="name of this run")
    metrics: dict[str, Difference] = Field(description="by metric, such as `dice` or `tre_mm.p95`")


class EvaluatedCase(Record):
    """The scores of one pair."""

    id: str = Field(description="as in the list")
    before: Scores = Field(description="as the headers say")
    runs: dict[str, Scores] = Field(description="by run")


class FailedCase(Record):
    """A pair that could not be evaluated, or whose registration is not good."""

    id: str = Field(description="as in the list")
    error: str | None = Field(None, description="why")
    exit_code: int = Field(description="what the command would end with for this pair")


class EvaluationListReport(Versioned):
    """`evaluate PAIRS.csv --json`."""

    list: str = Field(description="path of the list, as given")
    protocol: Literal["regtool", "learn2reg"] = Field(description="as `--protocol`")
    label_interpolation: str = Field(description="how labels are carried: nearest")
    note: str | None = Field(None, description="what a reader must know to compare the numbers")
    pairs: int = Field(description="that were evaluated")
    before: dict[str, MeanFacts] = Field(description="by metric, such as `dice`, `dice.3` (label 3) or `tre_mm.p95`")
    runs: dict[str, dict[str, MeanFacts]] = Field(description="by run, then by metric")
    compared: tuple[Comparison, ...] | None = Field(None, description="with several runs: each against the first")
    worst_by: str | None = Field(description="metric by which the cases are ordered; null where none is known")
    cases: tuple[EvaluatedCase, ...] = Field(description="pair by pair, the worst first")
    missing: dict[str, tuple[str, ...]] = Field(description="by run, the ids that it has no result for (`--skip-missing`)")
    failed: tuple[FailedCase, ...] = Field(description="pairs that could not be read")
    table: str | None = Field(None, description="path of the CSV (`--csv`)")
    seconds: Number = Field(description="of all the work")
    warnings: tuple[str, ...] = Field(description="what was said on the way")


# --- train ----------


class TrainingOutputs(Record):
    """Files of the run folder."""

    model: str = Field(description="the weights, the best by validation")
    state: str = Field(description="to go on from")
    history: str = Field(description="table of the steps")
    curves: str = Field(description="the same as a picture")
    parameters: str = Field(description="all parameters as they came to be")
    pairs: str | None = Field(None, description="picture of some synthetic pairs (`--synthetic`)")


class ValidationScores(Record):
    """Means over the validation pairs, on the network's grid."""

    similarity: Number = Field(description="of the images; higher is better")
    objective: Number = Field(description="what the network lowers, without supervision")
    folding_percent: Number = Field(description="voxels that fold")
    dice: Number | None = Field(None, description="soft, of linearly warped labels")
    tre_voxels: Number | None = Field(None, description="of landmarks")
    epe_voxels: Number | None = Field(None, description="of a displacement that is known")


class TrainingReport(Versioned):
    """`report.json` of `train` and of `finetune-oneshot PAIRS.csv`."""

    status: Literal["ok"] = Field(description="ok")
    method: str = Field(description="of the network")
    folder: str = Field(description="the run folder, absolute")
    outputs: TrainingOutputs = Field(description="the files that were written, relative to the folder")
    model: ModelFacts = Field(description="the weights that are kept")
    steps: int = Field(description="updates of the weights")
    best_step: int = Field(description="after which the weights were kept")
    data: str = Field(description="name of the list of pairs, or what synthetic pairs are")
    pairs: int | None = Field(None, description="in the list to learn from")
    validation_pairs: int = Field(description="that were validated with")
    device: str = Field(description="cpu, cuda:0, mps")
    parent: ModelFacts | None = Field(None, description="the model that the training started from")
    seed: int = Field(description="as `--seed`")
    minutes: Number = Field(description="of training, all runs of a resumed one together")
    before: ValidationScores | None = Field(None, description="of the start")
    after: ValidationScores | None = Field(None, description="of what is kept")
    peak_memory_mb: Number = Field(description="largest resident memory of the process")
    versions: dict[str, str] = Field(description="of regtool and of what decides its numbers")
    command: str = Field(description="as it was typed")
    warnings: tuple[str, ...] = Field(description="what was said on the way")


# --- cohort ----------


class CohortOutputs(Record):
    """Files of the cohort's folder."""

    results: str = Field(description="table of the results")
    page: str = Field(description="the page of all pairs")


class CohortReport(Versioned):
    """`cohort --json`. The folder itself holds a report for each pair."""

    status: Literal["ok", "qc_failed", "failed", "not_run"] = Field(description="of the pair that is furthest from done")
    folder: str = Field(description="of the cohort, absolute")
    pairs: int = Field(description="of this shard")
    ok: int = Field(description="pairs that are done")
    qc_failed: int = Field(description="pairs that are done and missed a threshold of `[qc]`")
    failed: int = Field(description="pairs that failed")
    not_run: int = Field(description="pairs that were not reached")
    skipped: int = Field(description="pairs that were finished before (`--resume`)")
    seconds: Number = Field(description="of all the work")
    pairs_per_minute: Number | None = Field(None, description="of this run")
    exit_code: int = Field(description="that of the worst pair")
    not_good: tuple[FailedCase, ...] = Field(description="pairs that failed, or missed a threshold")
    outputs: CohortOutputs = Field(description="relative to the folder")


class CohortIdentity(Versioned):
    """`cohort.json`: what makes a cohort that cohort, so that `--resume` never mixes two."""

    pairs: dict[str, dict[str, str]] = Field(description="by id, the absolute path of each input by role")
    parameters: dict[str, Any] = Field(description="that decide a result, by `section.key`")
    files: dict[str, str | None] = Field(description="SHA-256 of the model and of the initial transform")


REPORTS: tuple[type[Versioned], ...] = (
    RegistrationReport, FailureReport, EvaluationReport, EvaluationListReport, TrainingReport, CohortReport, CohortIdentity,
)  # fmt: skip


def json_schema() -> str:
    """The JSON Schema of all reports: one of `REPORTS`, each under `$defs`."""
    union: Any = REPORTS[0]
    for report in REPORTS[1:]:
        union = union | report
    found = TypeAdapter(union).json_schema()
    return json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Reports of regtool", **found}, indent=2) + "\n"
