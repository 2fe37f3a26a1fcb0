"""The parameter file: TOML, one section a storey, every field documented where it is declared. No torch in here.

Precedence: defaults < file < `--set section.key=value`. `[engine]` stays raw here; the method's own `Parameters` validates it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, field_validator, model_validator

from regtool.config.choices import DEVICE, LARGEST_SEED, MOST_THREADS, ImageFormat, IntensityScaling, Precision, Schedule, TimeMode
from regtool.config.registration import Align, Guard, Metric, MetricName, Modality, Oneshot, Refine, SimilarityMetric
from regtool.config.section import Percentiles, Section, number

FORMAT = 1


class Grid(Section):
    """The grid on which the network works; it covers the fixed image edge to edge."""

    spacing_mm: float | None = Field(None, gt=0, description="voxel size in mm of the network grid; left out: the fixed image's own voxels")
    size: tuple[int, ...] | None = Field(None, description="voxels along x, y[, z], whatever their size then is; instead of spacing_mm")
    max_voxels: int | None = Field(
        None,
        ge=64,
        description="coarsen the finest axes until the grid has at most this many voxels; left out: no limit (with a model), 250000 (without)",
    )
    max_voxels_trained: int = number(
        250_000, "the same where the network is learned on the pair from scratch and max_voxels is left out: minutes, not hours, on two cores", ge=64
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> Grid:
        if self.size is not None and (len(self.size) not in (2, 3) or min(self.size) < 1):
            raise ValueError("size: expected two or three positive numbers")
        if self.size is not None and (self.spacing_mm is not None or self.max_voxels is not None):
            raise ValueError("size goes without spacing_mm and max_voxels")
        return self


class Preprocess(Section):
    """How images enter networks and similarities, in training and in registration alike: intensities, resolution, masks, what both images show."""

    intensity: IntensityScaling = Field(
        "percentile", description="percentile: clip to `percentiles` of each image, scale to [0, 1]; minmax: scale to [0, 1]; none: as they are"
    )
    percentiles: Percentiles = Field((0.0, 99.9), description="lower and upper percentile of each image")
    top: float = Field(1.0, gt=0, description="what the upper end becomes instead of 1, for networks trained on another scale")

    max_quantile_samples: int = number(1_000_000, "percentiles are those of at most about so many voxels, evenly spread", unit="voxels", ge=1000)
    foreground_contrast: float = number(
        0.01, "an image shows something where it differs from its first voxel by more than this share of its range", ge=0, lt=1
    )
    foreground_margin: float = number(0.02, "rim around the block in which an image shows something, as a share of each axis", ge=0, le=0.5)
    min_foreground_share: float = number(
        0.5, "a grid gets finer where little of it shows something, as if this share did at least: all of it has to be carried along", gt=0, le=1
    )
    max_hole_share: float = number(
        0.25,
        "a mask that leaves out at most this share of what its image shows hides something, and the image is continued over it; one that leaves out "
        "more marks an organ",
        ge=0, le=1, chosen_on="implants in T1 and PD slices, a head with the mask of its brain",
    )  # fmt: skip
    coarser_ratio: float = number(
        1.5,
        "voxels of the moving image so many times as wide as the fixed ones are wider: along that axis the fixed image is smoothed to be as blurred",
        ge=1, le=100, chosen_on="one head with known displacements, seen in slices of 5 mm and voxels of 3 mm; brains of two people",
    )  # fmt: skip
    coverage_max_voxels: int = number(60_000, "of the grid on which is asked what the moving image covers", unit="voxels", ge=64)


class TrainingSimilarity(SimilarityMetric):
    """What a network learns to raise."""

    name: MetricName = Field("lncc", description="as in [metric], where it says more")
    weight: float = Field(1.0, ge=0, description="factor of the similarity term; 0 leaves it out, where something else is learned from")


class Regularization(Section):
    """How smooth the displacements of a network shall be: factors of terms that are added up, 0 leaves a term out."""

    diffusion: float = Field(1.0, ge=0, description="mean squared gradient (Balakrishnan 2018)")
    bending: float = Field(0.0, ge=0, description="bending energy: mean squared second derivatives (Rueckert 1999)")
    tv: float = Field(0.0, ge=0, description="total variation, the sum over all voxels (Ferrante 2018), not the mean")
    l2: float = Field(0.0, ge=0, description="Euclidean norm of the whole displacement, divided by the number of voxels (Ferrante 2018)")
    folding: float = Field(0.0, ge=0, description="mean of how far the Jacobian determinant falls below zero")


class Supervision(Section):
    """What else a network learns from, for pairs that have it: factors, 0 leaves a term out."""

    dice: float = Field(0.0, ge=0, description="1 - mean soft Dice of the warped labels, where a pair has labels")
    landmarks: float = Field(0.0, ge=0, description="mean distance in voxels of the mapped landmarks, where a pair has landmarks")
    displacement: float = Field(0.0, ge=0, description="mean distance in voxels to the known displacement, which synthetic pairs have")


class Augment(Section):
    """Random changes to the images a network learns from, synthetic ones excepted; the same to both of a pair unless said otherwise."""

    flip: float = Field(0.0, ge=0, le=1, description="probability of mirroring each axis")
    rotate90: float = Field(0.0, ge=0, le=1, description="probability of quarter turns in the x-y plane, where x and y have equal sizes")
    rotation_degrees: float = Field(0.0, ge=0, le=180, description="largest rotation about each axis")
    scaling: float = Field(0.0, ge=0, lt=1, description="largest relative change of size")
    translation: float = Field(0.0, ge=0, lt=1, description="largest shift, as a part of the image's size")
    elastic_voxels: float = Field(
        0.0, ge=0, description="largest displacement, in voxels, of a smooth random field that deforms the moving image only; the field is known"
    )
    elastic_spacing: float = Field(16.0, ge=2, description="voxels between the control points of that field")
    intensity: float = Field(0.0, ge=0, lt=1, description="strength of random gamma, contrast and brightness, other for each image")
    noise: float = Field(0.0, ge=0, lt=1, description="largest standard deviation of added noise, intensities being 0 to 1")


class Synthesis(Section):
    """Pairs that `regtool train --synthetic` makes: shapes of random labels, warped twice and painted twice (Hoffmann 2022)."""

    size: tuple[int, ...] = Field((48, 48, 48), description="voxels along x, y[, z]; two numbers make 2-D pairs")
    labels: tuple[int, int] = Field((8, 24), description="least and largest number of labels in a pair, background included")
    loss_labels: int = Field(8, ge=1, description="labels of a pair that Dice looks at, drawn by chance; the others count as background")
    amplitude: float = Field(0.08, ge=0, le=0.5, description="largest displacement by each of the two velocities, as a part of the image's size")
    rotation_degrees: float = Field(6.0, ge=0, le=180, description="largest rotation of each image about each axis")
    scaling: float = Field(0.06, ge=0, lt=1, description="largest relative change of each image's size along each axis")
    shear: float = Field(0.03, ge=0, lt=1, description="largest shear of each image")
    translation: float = Field(0.03, ge=0, lt=1, description="largest shift of each image, as a part of its size")
    object: float = Field(0.5, ge=0, le=1, description="probability that the labels fill an ellipsoid or box in an empty background")
    tubes: float = Field(0.3, ge=0, le=1, description="probability of thin tubes and shells")
    nested: float = Field(0.2, ge=0, le=1, description="probability of fine labels inside some of the coarse ones")
    same_contrast: float = Field(0.5, ge=0, le=1, description="probability that both images give a label the same intensity")
    inverted: float = Field(0.1, ge=0, le=1, description="probability that the moving image is turned into its negative")
    dark_background: float = Field(0.5, ge=0, le=1, description="probability that the background is 0 and has no texture")
    texture: float = Field(0.15, ge=0, lt=1, description="largest standard deviation of the texture within a label, intensities being 0 to 1")
    bias: float = Field(0.3, ge=0, description="strength of the smooth shading: the standard deviation of its logarithm")
    gamma: float = Field(0.25, ge=0, description="standard deviation of the logarithm of gamma")
    blur_voxels: float = Field(1.5, ge=0, description="largest standard deviation of the blur, at 96 voxels across; in proportion at other sizes")
    thick_slices: float = Field(0.2, ge=0, le=1, description="probability that slices along one axis are two to four times as thick")
    clipping: float = Field(0.2, ge=0, le=1, description="probability that the darkest and brightest intensities are cut off")
    noise: float = Field(0.05, ge=0, lt=1, description="largest standard deviation of the noise, Gaussian or Rician")
    truncation: float = Field(0.2, ge=0, le=1, description="probability that an end of the field of view is missing, up to a quarter")
    similarity: float = Field(
        0.0,
        ge=0,
        description="factor of the images' similarity, in place of training_similarity.weight: the two contrasts need have nothing in common",
    )

    @model_validator(mode="after")
    def _possible(self) -> Synthesis:
        if len(self.size) not in (2, 3) or min(self.size) < 8:
            raise ValueError("size: expected two or three numbers from 8")
        if not 2 <= self.labels[0] <= self.labels[1] <= 255:
            raise ValueError("labels: expected two numbers from 2 to 255, the lower one first")
        return self


class Train(Section):
    """How `regtool train` runs."""

    steps: int = Field(10_000, ge=1, description="updates of the weights")
    max_minutes: float | None = Field(None, gt=0, description="end earlier, after so many minutes of this run")
    batch_size: int = Field(1, ge=1, description="pairs in one pass, on each GPU or process")
    accumulate: int = Field(1, ge=1, description="passes added up before an update")
    learning_rate: float = Field(1e-4, gt=0, description="of Adam, at its highest")
    betas: tuple[float, float] = Field((0.9, 0.999), description="decay rates of Adam's moments")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay (AdamW)")
    schedule: Schedule = Field("constant", description="of the learning rate; cosine: down to a hundredth at the last step")
    warmup_steps: int = Field(0, ge=0, description="steps over which the learning rate rises from zero")
    clip_norm: float | None = Field(None, gt=0, description="scale each update's gradient down to this norm; left out: never")
    ema: float = Field(0.0, ge=0, lt=1, description="decay of the running mean of the weights that is validated and kept; 0: the weights themselves")
    precision: Precision = Field("float32", description="of the convolutions; bf16 on a GPU only")
    validation_share: float = Field(0.1, ge=0, lt=1, description="part of the pairs, or images, held out by id where no validation list is given")
    validation_pairs: int = Field(20, ge=1, description="pairs that are looked at in a validation, spread over all that there are")
    validate_every: int = Field(500, ge=1, description="steps between validations")
    patience: int | None = Field(None, ge=1, description="end after so many validations without a better one; left out: never")
    checkpoint_every: int = Field(500, ge=1, description="steps between checkpoints")
    log_every: int = Field(10, ge=1, description="steps between the lines of history.csv, each the mean of so many")
    tensorboard: bool = Field(False, description="write TensorBoard event files too; needs the extra `tensorboard`")

    @field_validator("betas")
    @classmethod
    def _below_one(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError("expected two numbers from 0 to below 1")
        return value


class Quality(Section):
    """Thresholds of the result; beyond one, the run ends with exit code 4."""

    max_folding_percent: float | None = Field(1.0, ge=0, le=100, description="voxels whose Jacobian determinant is at or below zero")
    min_similarity_gain: float | None = Field(None, description="similarity after minus before")
    max_displacement_mm: float | None = Field(None, gt=0, description="largest displacement")
    min_dice: float | None = Field(None, ge=0, le=1, description="mean Dice after, where labels are given")
    max_tre_mm: float | None = Field(None, gt=0, description="mean target registration error after, where landmarks are given")


class Run(Section):
    """How the run is made."""

    model: str | None = Field(
        None,
        description="model file or name; left out: the weights that come with regtool for the method and dimension, where there are some; none: no "
        "trained weights, the method learns on the pair",
    )
    passes: int = Field(
        3, ge=1, le=4, description="times that trained weights see the pair, each time as registered so far; a further pass stays only where it helps"
    )
    device: Annotated[str, StringConstraints(to_lower=True)] = Field(
        "auto", pattern=f"(?i)^({DEVICE.pattern})$", description="auto, cpu, cuda, cuda:N or mps"
    )
    threads: int | None = Field(None, ge=1, le=MOST_THREADS, description="CPU threads; left out: all cores")
    seed: int = Field(0, ge=0, le=LARGEST_SEED, description="of every random number")
    precision: Precision = Field(
        "float32",
        description="of a trained network's convolutions; bf16 takes a quarter of the time where the hardware has it, learning stays in float32",
    )
    max_memory_gb: float | None = Field(None, gt=0, description="coarsen the network grid to fit; left out: nine tenths of the machine's memory")
    initial_transform: str | None = Field(None, description="transform file applied before everything else")
    outside: float | None = Field(None, description="intensity outside the moving image; left out: its minimum")
    format: ImageFormat = Field("nii.gz", description="of the images written")
    inverse: bool = Field(False, description="write the inverse displacement too")
    qc: bool = Field(True, description="write qc.html and qc.png")
    time: TimeMode = Field("each", description="4-D moving image: a transform for each time point, or one for all from the mean")


class Parameters(Section):
    """A whole parameter file."""

    format: Literal[1] = Field(1, description="version of this file format")
    method: str | None = Field(None, description="a registration method, see `regtool methods`; left out: no network, the field is refined from zero")
    run: Run = Run()
    grid: Grid = Grid()
    preprocess: Preprocess = Preprocess()
    align: Align = Align()
    engine: dict[str, Any] = Field({}, description="the method's own parameters, see `regtool parameters init METHOD`")
    training_similarity: TrainingSimilarity = TrainingSimilarity()
    regularization: Regularization = Regularization()
    supervision: Supervision = Supervision()
    augment: Augment = Augment()
    synthesis: Synthesis = Synthesis()
    train: Train = Train()
    metric: Metric = Metric()
    modality: Modality = Modality()
    oneshot: Oneshot = Oneshot()
    refine: Refine = Refine()
    guard: Guard = Guard()
    qc: Quality = Quality()
