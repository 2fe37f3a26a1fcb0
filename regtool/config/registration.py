"""The sections of a registration: how images are aligned, compared, accepted, refined, and learned on. Every number that decides is declared here."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Field, field_validator

from regtool.config.choices import Alignment, similarities
from regtool.config.section import ByDimension, Percentiles, Section, number
from regtool.errors import did_you_mean


def _known_similarity(name: str) -> str:
    """The name in lower case. ValueError with the nearest one for an unknown name."""
    if name.lower() not in similarities():
        raise ValueError(f"expected one of {', '.join(similarities())}; {did_you_mean(name, similarities())}")
    return name.lower()


def _known_metric(name: str) -> str:
    return "auto" if name.lower() == "auto" else _known_similarity(name)


MetricName = Annotated[str, AfterValidator(_known_similarity)]
MetricNameOrAuto = Annotated[str, AfterValidator(_known_metric)]

# The images on which the tuned numbers were chosen. What was tried is told in docs/development/experiments.md.
PAIRS = "heads, brain slices, hearts, hippocampi, lungs, prostates, chest X-rays, digits"
ONE_MODALITY = "two people's brains, one brain on two days, lungs"
TWO_MODALITIES = "T1 and T2 of one head with known displacements, MR and ultrasound of prostates"


class SimilarityMetric(Section):
    """How two images are compared."""

    name: str
    window: int | None = Field(None, ge=3, le=255, description="voxels across the window of lncc or lg, odd; left out: 9 for lncc, 7 for lg")
    bins: int = Field(32, ge=4, le=256, description="of each image in the joint histogram of mi")

    @field_validator("window")
    @classmethod
    def _odd(cls, value: int | None) -> int | None:
        if value is not None and value % 2 == 0:
            raise ValueError("expected an odd number")
        return value


class Metric(SimilarityMetric):
    """What a good match is: what acceptance compares, refining raises and the report states."""

    name: MetricNameOrAuto = Field(
        "auto",
        description=f"a similarity ({', '.join(similarities())}), see docs/algorithm.md; auto: lncc or mi, as the intensities of the "
        "aligned images relate",
    )
    channel_weights: tuple[float, ...] | None = Field(
        None, description="share of each channel of images that have several, 0 leaves one out, for example [1, 0.5]; left out: all alike"
    )

    @field_validator("channel_weights")
    @classmethod
    def _shares(cls, value: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if value is not None and (not value or min(value) < 0 or max(value) == 0):
            raise ValueError("expected a number from 0 for each channel, at least one of them above 0")
        return value


class Align(Section):
    """Before the network: a linear map that brings the images together."""

    method: Alignment = Field(
        "auto",
        description="none; center: centre of the image on centre; moments: centre of mass on centre of mass; rigid, affine: turned and shifted, also "
        "stretched, by mutual information; auto: whichever of them is clearly better than what is simpler",
    )

    # which map is taken
    center_acceptance_ratio: float = number(
        1.1, "centres of the images are laid onto each other only for so many times the score of the headers", ge=1, le=100, chosen_on=PAIRS
    )
    moments_acceptance_ratio: float = number(1.1, "the same of the centres of mass", ge=1, le=100, chosen_on=PAIRS)
    rigid_acceptance_ratio: float = number(1.03, "the weight of a rigid map where it competes with an affine one", ge=1, le=100, chosen_on=PAIRS)
    affine_acceptance_ratio: float = number(1.06, "the weight of an affine map where it competes with a rigid one", ge=1, le=100, chosen_on=PAIRS)
    linear_acceptance_ratio: float = number(
        1.06,
        "a rigid or affine map must reach so many times the score of headers or shift; aligned brains of two people reach 1.04",
        ge=1, le=100, chosen_on=PAIRS,
    )  # fmt: skip
    min_mind_similarity: float = number(
        -0.13,
        "a rigid or affine map is taken only where structures are so alike (minus the mean squared difference of MIND); good pairs end at "
        "-0.003 to -0.12, MR on ultrasound below -0.135",
        ge=-10, le=0, chosen_on=PAIRS,
    )  # fmt: skip
    peak_ratio: float = number(
        0.955,
        "or where they are, by this factor, more alike than at peak_distance_voxels in every direction; right maps reach 0.95, wrong ones 0.975",
        gt=0, le=1, chosen_on="parts of two people's slices; MR on ultrasound, unrelated parts of chest X-rays",
    )  # fmt: skip
    peak_distance_voxels: float = number(3.0, "how far aside is looked for peak_ratio", unit="voxels of the finest level", gt=0, le=100)
    turn_acceptance_ratio: ByDimension = number(
        (1.2, 1.35),
        "2-D, 3-D: a start turned by right angles is believed for so many times the score of the others; heads end at 1.4 to 2.2, slices at 1.15 to "
        "1.3, wrong turns at 1.0, MR on ultrasound at 1.4",
        chosen_on=PAIRS,
    )
    turn_acceptance_ratio_small: float = number(1.5, "the same for images so small that they have one level", ge=1, le=100, chosen_on="digits")
    shift_acceptance_ratio: float = number(
        1.2,
        "a start by a shift to elsewhere is believed for so many times the score; parts of a body find their place at 1.25 to 16, wrong ones at 1.15",
        ge=1, le=100, chosen_on="parts of heads, lungs and slices",
    )  # fmt: skip
    pixel_acceptance_ratio: float = number(
        1.1,
        "of pictures without a pixel size, equal pixels are believed rather than equal fields of view for so many times the score",
        ge=1, le=100, chosen_on="hearts at two resolutions, digits",
    )  # fmt: skip

    # where the search starts
    start_angle_degrees: float = number(20.0, "further starts are turned by so much about each axis", unit="degrees", ge=0, le=180)
    start_scale: float = number(1.2, "and, for affine maps, scaled by this factor up and down", ge=1, le=10)
    min_start_distance_voxels: float = number(0.5, "starts no farther apart are one", unit="voxels of the coarsest level", ge=0, le=100)
    small_moving_ratio: float = number(
        0.7,
        "a moving field of view smaller than this share of the fixed one is laid onto it by the inverse problem",
        ge=0,
        le=1,
        chosen_on="parts of bodies",
    )
    max_shifts: int = number(1000, "shifts that are tried at the coarsest level at most", ge=1, le=1_000_000)
    shift_samples: int = number(600, "voxels that each of these shifts is judged by", ge=10, le=1_000_000)
    min_shift_overlap: float = number(0.6, "of the smaller field of view that a shift must leave in common", gt=0, le=1)
    chance_deviations: float = number(
        4.0,
        "standard deviations above its mean that the mutual information of independent images reaches at the best of so many shifts",
        ge=0,
        le=100,
    )
    max_shifts_kept: int = number(4, "of the shifts that are searched further", ge=1, le=1000)
    min_shift_distance: float = number(1.5, "between two shifts that are kept", unit="steps of the lattice of shifts", ge=0, le=100)

    # the search
    max_voxels: int = number(
        30_000,
        "of the fixed image at the finest level; twice as many take twice as long and gain a tenth of a voxel",
        ge=64,
        le=100_000_000,
        chosen_on=PAIRS,
    )
    min_voxels: int = number(400, "of the fixed image at the coarsest level, where it has as many", ge=1, le=100_000_000)
    levels: int = number(3, "resolutions, each half of the next", ge=1, le=8)
    min_bins: int = number(8, "of the histogram along each axis; between the two, the cube root of the number of voxels", ge=4, le=256)
    max_bins: int = number(32, "of the histogram along each axis", ge=4, le=256)
    percentiles: Percentiles = number((1.0, 99.0), "intensities beyond are cut off", unit="percent")
    moving_spacing_ratio: float = number(
        0.6, "moving voxels to fixed ones; equal ones would draw the two lattices onto each other (Pluim 2000)", gt=0, le=10
    )
    overlap_power: float = number(
        0.3,
        "power of the overlap's share in the score; at 1 a large field of view is squeezed into a small one, at 0 the images may slide apart",
        ge=0, le=10, chosen_on=PAIRS,
    )  # fmt: skip
    min_common_share: float = number(0.25, "of the fixed image: with less in common two places are not compared over the same voxels", ge=0, le=1)
    strain_weight: float = number(
        0.5,
        "price of a stretch by a factor e; without it MR is squeezed flat into ultrasound, ten times as much changes nothing else",
        unit="nats", ge=0, le=1000, chosen_on=PAIRS,
    )  # fmt: skip
    iterations: int = number(20, "Gauss-Newton steps at each level at most", ge=0, le=10_000)
    min_step_voxels: float = number(0.02, "a shorter step is the last", unit="voxels of the level", gt=0, le=100)
    max_step_voxels: float = number(4.0, "no step is longer", unit="voxels of the level", gt=0, le=1000)
    damping: tuple[float, float] = number(
        (1e-3, 1e-4), "added to the diagonal of the normal equations: parts of each entry and of their mean; a motion that nothing shows is not made"
    )
    max_step_factor: float = number(8.0, "times the Gauss-Newton step, which far from the optimum is too careful", ge=1, le=1000)

    # the field of view
    min_coverage: float = number(
        0.75,
        "of what the fixed image shows, by the moving one; with less, only the block that both show is compared",
        ge=0, le=1, chosen_on="parts of heads",
    )  # fmt: skip

    @field_validator("turn_acceptance_ratio")
    @classmethod
    def _ratios(cls, value: ByDimension) -> ByDimension:
        if min(value) < 1:
            raise ValueError("expected two numbers from 1")
        return value


class Modality(Section):
    """What `metric.name = "auto"` goes by: do brighter and darker mean the same in both images?"""

    min_agreement: ByDimension = number(
        (1.33, 1.5),
        "2-D, 3-D: agreement in sign and shared histogram together from which on images are of one modality; of two modalities at most 1.29 and 1.40",
        chosen_on="207 pairs: " + PAIRS,
    )
    window: int = number(5, "voxels across the windows whose correlation is looked at", ge=3, le=255)
    min_variance: float = number(1e-3, "of a window that says something, intensities being 0 to 1", ge=0, le=1)
    min_tissue_share: float = number(
        0.05, "of the windows that say something; where fewer see no background, those that see some count too", ge=0, le=1
    )
    percentiles: Percentiles = number((1.0, 99.0), "of each image's own intensities, between which histograms are compared", unit="percent")
    histogram_bins: int = number(20, "of the histograms that are compared", ge=2, le=256)
    background_bins: int = number(64, "of the histogram whose highest bin may be background", ge=2, le=4096)
    min_background_share: float = number(0.15, "of the voxels, from which on the most frequent intensity is background", ge=0, le=1)
    max_voxels: int = number(250_000, "of the grid on which the relation is asked", ge=64, le=100_000_000)
    rough_max_voxels: int = number(60_000, "of the grid on which `pyramid` brings the anatomies together before", ge=64, le=100_000_000)
    rough_passes: int = number(2, "how often it does", ge=0, le=4)


class Guard(Section):
    """When a stage is rolled back."""

    repair_folds: bool = Field(True, description="relax a field where, and only where, it folds")
    max_folding_percent: float = Field(1.0, ge=0, le=100, description="a stage whose field still folds in more of its voxels is rolled back")
    tolerance: float = number(1e-6, "a similarity that falls by less has not fallen: rounding", ge=0, le=1)
    min_gain: float = number(
        1e-3,
        "part of the similarity that the first deformation must gain; images that match already would follow noise",
        ge=0,
        le=10,
        chosen_on=ONE_MODALITY,
    )
    min_gain_mi: float = number(
        0.04,
        "the same for mi: refining T1 and T2 that match gains 0.01 and moves them by 0.65 mm; 0.7 mm apart it gains 0.04 and leaves as much",
        ge=0, le=10, chosen_on=TWO_MODALITIES,
    )  # fmt: skip
    min_information: float = number(
        0.25,
        "that aligned images of two modalities must share to be deformed; T1 and T2 20 mm apart share 0.38, MR and ultrasound 0.07 to 0.20",
        unit="nats", ge=0, le=100, chosen_on=TWO_MODALITIES,
    )  # fmt: skip
    mirror_folding_percent: float = number(
        50.0, "where more of the voxels fold, the transform mirrors space by intention: not repaired", ge=0, le=100
    )


class RegularizationPreset(Section):
    """How stiff a refined field is."""

    diffusion: float = Field(ge=0, le=1e6, description="factor of the mean squared gradient of the displacement, mm over mm")
    smoothings: int = Field(ge=0, le=10_000, description="averages of the field over three voxels along each axis before it warps")
    step_voxels: float = Field(0.25, gt=0, le=100, description="learning rate of Adam, voxels of the level")


PRESETS = {
    "default": RegularizationPreset(diffusion=0.5, smoothings=2),
    "lncc": RegularizationPreset(diffusion=1.5, smoothings=2),
    "mi": RegularizationPreset(diffusion=1.0, smoothings=40),
    "ngf": RegularizationPreset(diffusion=0.1, smoothings=40, step_voxels=0.4),
    "strong": RegularizationPreset(diffusion=0.3, smoothings=20),
}


class Refine(Section):
    """Optimising the displacement of the pair itself, after the network or instead of it."""

    iterations: int = Field(60, ge=0, le=1_000_000, description="steps at each level at most, half as many after a network; 0 leaves refining out")
    levels: int = Field(3, ge=1, le=8, description="resolutions, each half of the next; five sixths of the steps at the finest")
    max_voxels: int = Field(1_300_000, ge=64, description="of the finest level, where the fixed image shows something")
    step_voxels: float | None = Field(
        None,
        gt=0,
        le=100,
        description="learning rate of Adam, in voxels of the level, at first 1.5 times as much, at last 0.45; left out: 0.4 for ngf, 0.25 for others",
    )
    finest: MetricName | None = Field(
        None, description="similarity that the finest level raises; left out: ngf where [metric] is mi in 3-D, else that of [metric]"
    )
    diffusion: float | None = Field(
        None,
        ge=0,
        le=1e6,
        description="factor of the mean squared gradient of the displacement, mm over mm; left out: 1 for mi, 0.1 for ngf, 0.5 for others, 1.5 for "
        "lncc, and 0.3 for it where a field of 20 smoothings explains the images",
    )
    smoothings: int | None = Field(
        None,
        ge=0,
        le=10_000,
        description="averages of the field over three voxels along each axis before it warps; left out: 40 for mi and ngf, 2 for others, and "
        "20 for lncc where so stiff a field explains the images",
    )
    symmetric: bool = Field(
        False, description="both directions at once, by a velocity: images exchanged give the inverse, nothing folds; some four times as long"
    )
    dice: float = Field(0.0, ge=0, le=1e6, description="factor of 1 - mean soft Dice, where labels are given; 0: labels only evaluate")
    landmarks: float = Field(
        0.0, ge=0, le=1e6, description="factor of the mean distance of landmarks in voxels, where they are given; 0: they only evaluate"
    )

    # levels and steps
    min_axis_voxels: int = number(12, "along an axis: it stops shrinking at the coarser levels", unit="voxels", ge=1, le=10_000)
    iterations_share_after_network: float = number(0.5, "of the iterations, from a network's field: most of the way is behind it", ge=0, le=1)
    finest_iterations_share: float = number(
        5 / 6, "of the iterations that are enough at the finest level, unless another similarity takes over there", gt=0, le=1, chosen_on=ONE_MODALITY
    )
    step_factors: tuple[float, float] = number(
        (1.5, 0.45),
        "times step_voxels: at the first step and at the end of a level; small steps settle what large ones have found",
        chosen_on=ONE_MODALITY,
    )
    betas: tuple[float, float] = number((0.9, 0.99), "decay rates of Adam's moments")
    epsilon: float = number(1e-8, "of Adam", gt=0, le=1)
    linearized_steps: int = number(
        2,
        "steps for which the warped image is taken to change linearly with the displacement; with 3, ngf ends too early",
        ge=1,
        le=100,
        chosen_on=PAIRS,
    )
    min_improvement: float = number(
        1e-4,
        "a level ends where so much, of what the masks let count, is not gained in patience_share of its iterations",
        ge=0,
        le=1,
        chosen_on=PAIRS,
    )
    patience_share: float = number(0.1, "of a level's iterations, over which that is asked", gt=0, le=1)
    min_patience: int = number(
        5, "steps, over which that is asked at least; with 3, T1 and T2 within a mask ended 0.2 mm worse", ge=1, le=10_000, chosen_on=TWO_MODALITIES
    )
    squarings: int = number(5, "of the velocity of a symmetric registration, which moves few voxels at any level", ge=1, le=20)

    # which metric, how stiff
    finest_ngf: bool = number(
        True,
        "in 3-D, where [metric] is mi, ngf takes over at the finest level: few voxels fill a histogram but edges are exact",
        chosen_on=TWO_MODALITIES,
    )
    start_trust: ByDimension = number(
        (0.75, 0.0),
        "2-D, 3-D: the part of a network's field that counts as no roughness with lncc, so that large motion it has found may stay",
        chosen_on="hearts",
    )
    presets: dict[str, RegularizationPreset] = number(
        PRESETS,
        "diffusion, smoothings and step_voxels where they are left out: by metric, `default` for the others; `strong` is tried first with lncc",
        chosen_on=PAIRS,
    )
    strong_is_enough: float = number(
        0.85, "lncc from which the strong preset explains the images, at the level before the finest", ge=0, le=2, chosen_on="lungs: 0.88"
    )
    min_explained_share: ByDimension = number(
        (0.0, 0.15),
        "2-D, 3-D: of what the strong preset leaves, that the weak one must explain; brains of two people 0.24 to 0.28, of one on two days 0.11",
        chosen_on=ONE_MODALITY,
    )
    min_axis_for_strong: int = number(
        64,
        "along an axis in the mean, from which the strong preset is tried: in smaller images it is stiffer than organs",
        unit="voxels",
        ge=1,
        le=100_000,
    )

    @field_validator("presets", mode="before")
    @classmethod
    def _completed(cls, value: Any) -> Any:
        """Those that are left out, and what is left out of one, are as they are by default."""
        if not isinstance(value, dict):
            return value
        known = {*similarities(), "default", "strong"}
        if unknown := sorted(value.keys() - known):
            raise ValueError(f"{unknown[0]} is no metric, default or strong")
        complete: dict[str, Any] = {**PRESETS, **value}
        return {
            name: {**PRESETS.get(name, PRESETS["default"]).model_dump(), **own} if isinstance(own, dict) else own for name, own in complete.items()
        }


class Oneshot(Section):
    """Learning on the pair itself: where there is no model, and in `regtool finetune-oneshot` (Ferrante 2018)."""

    iterations: int = Field(300, ge=0, description="steps at most; finetune-oneshot: 50")
    learning_rate: float | None = Field(None, gt=0, le=100, description="of Adam; left out: 1e-3 from scratch, 1e-4 from a model's weights")
    patience: int = Field(60, ge=1, description="stop after so many steps without a better loss")
    scratch_learning_rate: float = number(1e-3, "of Adam where learning_rate is left out: from scratch", gt=0, le=100)
    adapting_learning_rate: float = number(1e-4, "of Adam where learning_rate is left out: from a model's weights", gt=0, le=100)
    min_gain: float = number(1e-6, "of the loss: less is rounding", ge=0, le=1)
