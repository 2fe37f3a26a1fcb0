"""Every stage on a GPU that is only claimed (tests/devices.py): no operation on tensors of two devices, the CPU's results, and few copies.

What only a real GPU can tell, its rounding and its memory, is for the tests marked `gpu`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from regtool.config.registration import Align, Metric, Modality, Refine
from regtool.config.schema import Augment, Oneshot, Parameters, Preprocess, Supervision, Synthesis, TrainingSimilarity
from regtool.deformation.smooth import extrapolate_displacement
from regtool.geometry.composition import compose, exponential
from regtool.geometry.folding import repair_folding
from regtool.geometry.images import Image, Labels, Landmarks
from regtool.geometry.inversion import invert, invert_points
from regtool.geometry.jacobian import jacobian_determinant, jacobian_statistics, min_one_sided_jacobian, nondiffeomorphic_volume_percent
from regtool.geometry.sampling import displacement_on, transform_points, warp, warp_labels, warp_voxels
from regtool.geometry.transforms import Affine, DisplacementField, PointMap, Transform
from regtool.io.models import bundled_model
from regtool.methods.model_file import load_model
from regtool.preprocessing.batch import Batch
from regtool.preprocessing.masks import inpaint_outside_mask
from regtool.registration.adaptation import learn
from regtool.registration.initialization import align
from regtool.registration.modality import similarity_for
from regtool.registration.pair import Annotations, Setup
from regtool.registration.pipeline import Registered, register_pair
from regtool.registration.refinement import refine
from regtool.runtime import Clock
from regtool.similarity import REGULARIZATIONS, SIMILARITIES, similarity
from regtool.training.augmentation import augmented
from regtool.training.synthesis import synthetic
from regtool.training.trainer import Trainer
from tests.conftest import blobs, random_grid, smooth_field
from tests.devices import ClaimedCuda, on_cuda
from tests.methods.test_methods import METHODS, made
from tests.training.test_augmentation import pair, seeded

GPU_PAGE = Path(__file__).resolve().parents[1] / "docs" / "gpu.md"
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SHAPES = {2: (28, 24), 3: (14, 16, 12)}
Stage = Callable[[torch.device], Any]


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """All in it."""
    if isinstance(value, torch.Tensor):
        yield value
    elif is_dataclass(value):
        yield from tensors([getattr(value, f.name) for f in fields(value)])
    elif isinstance(value, list | tuple):
        for one in value:
            yield from tensors(one)
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))


def numbers(value: Any) -> list[np.ndarray]:
    return [x.detach().double().numpy() for x in tensors(value)] + ([np.array(value, dtype=float)] if isinstance(value, float) else [])


def agrees(stage: Stage, lies: bool | None = True, tolerance: float = 1e-5) -> ClaimedCuda:
    """The stage on both devices: with one result, of which all tensors lie on the GPU (lies=False: none does, None: either).

    Blocks are of another size on a GPU than in a CPU's cache, so that sums differ by their rounding.
    """
    here = numbers(stage(CPU))
    with ClaimedCuda() as gpu:
        there = stage(CUDA)
        assert lies is None or all(on_cuda(x) == lies for x in tensors(there))
    found = numbers(there)
    assert len(here) == len(found) > 0
    for one, other in zip(here, found, strict=True):
        np.testing.assert_allclose(other, one, rtol=tolerance, atol=tolerance)
    return gpu


OPERATIONS: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "add": lambda a, b: a + b,
    "add a scalar tensor of the host": lambda a, b: a + b.sum(),
    "the other way round": lambda a, b: b + a.sum(),
    "multiply in place": lambda a, b: a.mul_(b),
    "cat": lambda a, b: torch.cat([a, b]),
    "stack scalars": lambda a, b: torch.stack([a.sum(), b.sum()]),
    "where": lambda a, b: torch.where(a > 0, a, b),
    "where, a condition of the host": lambda a, b: torch.where(b > 0, a, a),
    "matrix product": lambda a, b: a @ b.T,
    "minimum with a scalar": lambda a, b: torch.minimum(a, b.max()),
    "lerp": lambda a, b: torch.lerp(a, a, b),
    "addcmul": lambda a, b: torch.addcmul(a, b, a),
    "index by the host": lambda a, b: a[b[0].long()],
    "index of the host": lambda a, b: b[a[0].long()],
    "mask of the host": lambda a, b: a.masked_fill(b > 0, 1.0),
    "copy to the host": lambda a, b: b.copy_(a),
    "convolution": lambda a, b: F.conv1d(a[None], b[None]),
    "sampling": lambda a, b: F.grid_sample(a[None, None], b[None, None, :, :2], align_corners=True),
    "moved first": lambda a, b: a + b.to(a),
    "brought back": lambda a, b: a.cpu() + b,
    "made there": lambda a, b: a + torch.ones(b.shape, device=a.device),
    "made here": lambda a, b: a + torch.ones(b.shape),
    "made like it": lambda a, b: a + b.new_ones(3, 3),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_claimed_gpu_refuses_what_torch_refuses(name: str) -> None:
    """torch's own fake tensors are the judge: of what is refused, and of where a result lies."""

    def outcome() -> str:
        try:
            return str(OPERATIONS[name](torch.zeros(3, 3, device=CUDA), torch.zeros(3, 3)).device)
        except (RuntimeError, TypeError):
            return "refused"

    with FakeTensorMode():
        judged = outcome()
    with ClaimedCuda():
        assert outcome() == judged


def test_the_claimed_gpu_counts_copies_and_refuses_numpy() -> None:
    with ClaimedCuda() as gpu:
        x = torch.arange(6.0).to(CUDA)
        assert (x.device, x.cpu().device, float(x.sum())) == (torch.device("cuda", 0), CPU, 15.0)
        with pytest.raises(TypeError, match="Tensor.cpu"):
            x.numpy()
        with pytest.raises(RuntimeError, match="generator on cuda"):
            torch.rand(2, device=CUDA, generator=torch.Generator())
        assert torch.rand(2, device=CUDA, generator=torch.Generator(CUDA)).is_cuda
    assert [(event.what, event.bytes) for event in gpu.events] == [("to_device", 24), ("to_host", 24), ("wait", 0)]
    assert x.device == CPU


def scene(ndim: int, amplitude: float = 1.5) -> tuple[Image, Image]:
    """A textured ball and the same through a smooth field, on one oblique grid."""
    grid = random_grid(ndim, "oblique", 3, *{2: (24, 28), 3: (15, 18)}[ndim])
    noise = torch.rand(1, 1, *grid.shape, generator=seeded(0))
    ball = torch.from_numpy(blobs(grid.shape, tuple(n / 2 for n in grid.shape), min(grid.shape) / 3))
    moving = Image(ball * (0.5 + F.avg_pool2d(noise[0], 3, 1, 1) if ndim == 2 else 0.5 + F.avg_pool3d(noise[0], 3, 1, 1)), grid)
    return warp(moving, Transform((smooth_field(grid, amplitude, 4),)), grid), moving


def field(ndim: int, device: torch.device, amplitude: float = 2.0) -> DisplacementField:
    return smooth_field(random_grid(ndim, "oblique", 3, 14, 20), amplitude, 4).to(device)


def test_warp(ndim: int) -> None:
    """Images and labels where they lie, or on another device and back; affines, fields of other grids, and functions of other tools."""
    grid = random_grid(ndim, "flipped", 5, 14, 20)
    other = grid.resized(tuple(n // 2 for n in grid.size))
    image = Image(torch.rand(2, *grid.shape, generator=seeded(1)), grid)
    labels = Labels((4 * image.data[:1]).long(), grid)
    chain = (Affine(np.eye(ndim) * 1.02, np.full(ndim, 0.3)), smooth_field(other, 1.0, 2), PointMap(lambda x: x + 0.2, ndim, "spline"))

    def stage(device: torch.device) -> Any:
        out = []
        for parts in (chain, chain[1:2]):
            transform = Transform(parts).to(device)
            out += [warp(image.to(device), transform, other, outside) for outside in (None, 0.5)]
            out += [warp_labels(labels.to(device), transform, other, vote=vote) for vote in (True, False)]
            out.append(displacement_on(transform, other))
        return out

    def from_host(device: torch.device) -> Any:
        transform = Transform(chain)
        found = warp(image, transform, other, None, device), warp_labels(labels, transform, other, device=device)
        return (*found, displacement_on(transform, other, device))

    agrees(stage)
    agrees(from_host, lies=False)


def test_fields(ndim: int) -> None:
    """Jacobian, folds and their repair, composition, exponential, inverse, and what goes on beyond a block."""

    def stage(device: torch.device) -> Any:
        u, folded = field(ndim, device), field(ndim, device, 40.0)
        determinant, corners = jacobian_determinant(folded), min_one_sided_jacobian(folded.to_voxels())
        mask = determinant > 0.5
        said = jacobian_statistics(determinant, mask, corners), nondiffeomorphic_volume_percent(folded, mask)
        assert said[0].folding_percent > 0
        inverse, residual = invert(Transform((u,)), u.grid)
        out = [determinant, corners, repair_folding(folded.to_voxels(), 20), inverse, compose(u, inverse), exponential(u.to_voxels()[None])]
        out.append(extrapolate_displacement(u.to_voxels()[None], [3] * ndim, [5] * ndim))
        return [*out, *(torch.tensor(x, device=device) for x in (*vars(said[0]).values(), said[1], residual.mean_mm))]

    agrees(stage, tolerance=1e-4)


def test_points(ndim: int) -> None:
    points = random_grid(ndim, "oblique", 3, 14, 20).centre + np.random.default_rng(0).uniform(-3, 3, (5, ndim))

    def stage(device: torch.device) -> Any:
        transform = Transform((Affine.identity(ndim), field(ndim, device)))
        return [torch.from_numpy(x) for x in (transform_points(transform, points), invert_points(transform, points)[0])]

    gpu = agrees(stage, lies=False)
    assert sum(event.what == "to_host" for event in gpu.events) <= 2  # the field, once for each, not for each step


@pytest.mark.parametrize("name", sorted(SIMILARITIES))
def test_similarities_and_their_gradients(ndim: int, name: str) -> None:
    def stage(device: torch.device) -> Any:
        both = pair(SHAPES[ndim]).to(device)
        fixed, u = both.fixed, (0.3 * field(ndim, device).data[None]).requires_grad_()
        u = F.interpolate(u, SHAPES[ndim])
        two = torch.cat([both.moving, both.moving**2], dim=1)
        warped = warp_voxels(two, u)
        out = []
        for objective in (False, True):
            for weight in (None, both.fixed_mask):
                value = similarity(torch.cat([fixed, fixed], dim=1), warped, Metric(name=name), weight, objective=objective)
                out += [value, *torch.autograd.grad(value, u, retain_graph=True)]
        return out

    agrees(stage)


def test_regularizations_and_their_gradients(ndim: int) -> None:
    def stage(device: torch.device) -> Any:
        u = field(ndim, device).data[None].requires_grad_()
        values = [term(u) for term in REGULARIZATIONS.values()]
        return [*values, *(torch.autograd.grad(value, u)[0] for value in values)]

    agrees(stage)


def test_alignment_stays_on_the_host(ndim: int) -> None:
    """By design: 30 000 voxels and many small steps, of which a GPU would only wait for the next."""
    fixed, moving = scene(ndim)
    moving = replace(moving, grid=replace(moving.grid, origin=tuple(o + 4 for o in moving.grid.origin)))

    def stage(device: torch.device) -> Any:
        found = align(fixed, moving, Align(method="rigid"), Transform.identity(ndim))
        return torch.from_numpy(np.c_[found.affine.matrix, found.affine.translation])

    assert agrees(stage, lies=False).events == []


def test_modality(ndim: int) -> None:
    both = pair({2: (60, 56), 3: (24, 26, 28)}[ndim])

    def stage(device: torch.device) -> Any:
        name, why = similarity_for(both.fixed.to(device), both.moving.to(device), Modality())
        return [float(x) for x in re.findall(r"\d\.\d+", f"{name == 'mi':.1f} {why}")]

    with ClaimedCuda():
        there = stage(CUDA)
    assert stage(CPU) == there


def test_masks(ndim: int) -> None:
    fixed, _ = scene(ndim)
    mask = Image((fixed.data > fixed.data.mean()).float(), fixed.grid)
    agrees(lambda device: inpaint_outside_mask(fixed.to(device), mask.to(device)))
    agrees(lambda device: inpaint_outside_mask(fixed.to(device), mask))


@pytest.mark.parametrize("parameters", [m[1] for m in METHODS], ids=[m[0] for m in METHODS])
def test_methods_predict_and_train(parameters: Parameters, ndim: int) -> None:
    """Forward, several looks, one step of every phase with every kind of supervision, the running mean of the weights, validation, resuming."""
    shape = {2: (32, 32), 3: (16, 16, 16)}[ndim]
    alone = pair(shape)
    known = replace(alone, displacement=0.1 * torch.randn(1, ndim, *shape, generator=seeded(2)))
    section = parameters.train.model_copy(update={"batch_size": 2, "ema": 0.9, "clip_norm": 1.0})
    supervision = Supervision(dice=0.5, landmarks=0.1, displacement=0.1)
    asked = parameters.model_copy(update={"train": section, "supervision": supervision})

    class Feed:
        def pair(self, draw: int) -> Batch:  # noqa: ARG002
            return known

        def name(self, draw: int) -> str:
            return str(draw)

    def stage(device: torch.device) -> Any:
        torch.manual_seed(0)
        trainer = Trainer(made(asked, ndim), asked, Feed(), device)
        out = [trainer.update(0)]
        state = trainer.state()
        trainer.restore(state)
        validation = trainer.validate([known])
        assert validation is not None and validation.epe_voxels is not None
        batch = known.to(device)
        with torch.inference_mode():
            looks = list(trainer.engine.eval().passes(batch.fixed, batch.moving, 2))
        assert trainer.engine.warning() is None
        values = torch.tensor([x for terms in out for x in terms.values()] + [validation.objective, validation.folding_percent], device=device)
        return [values, *looks]

    agrees(stage, tolerance=2e-3)  # Adam divides by what is nearly nothing


def test_learning_on_the_pair(ndim: int) -> None:
    """With batch normalisation, which remembers the statistics of the pair."""
    parameters = dict(METHODS)["dirnet"]
    both = pair({2: (32, 32), 3: (16, 16, 16)}[ndim])

    def stage(device: torch.device) -> Any:
        batch = both.to(device)
        learned = learn(made(parameters, ndim).to(device), batch, Oneshot(iterations=3), TrainingSimilarity(name="ncc"), trained=False)
        with torch.inference_mode():
            return [learned.engine.displacement(batch.fixed, batch.moving), torch.tensor(learned.losses, device=device)]

    agrees(stage, tolerance=2e-3)


@pytest.mark.parametrize("name", sorted(SIMILARITIES))
@pytest.mark.parametrize("case", ["plain", "guided", "symmetric"])
def test_refinement(ndim: int, name: str, case: str) -> None:
    """guided: with masks, labels and landmarks, and from a start."""
    both = pair({2: (26, 30), 3: (12, 14, 26)}[ndim])
    if case != "guided":
        both = Batch(both.fixed, both.moving)
    symmetric = case == "symmetric"
    asked = Refine(iterations=3, levels=2, symmetric=symmetric, dice=0.5 * (case == "guided"), landmarks=0.01 * (case == "guided"))

    def stage(device: torch.device) -> Any:
        start = None if case != "guided" else torch.full((1, ndim, *both.fixed.shape[2:]), 0.5, device=device)
        found = refine(both.to(device), start, asked, Metric(name=name), [1.5] * ndim)  # type: ignore[arg-type]
        return [found.displacement, torch.tensor(found.losses, device=device)]

    gpu = agrees(stage, tolerance=5e-3)
    assert not [event for event in gpu.events if event.what == "to_host"]


def test_synthesis(ndim: int) -> None:
    size = {2: (40, 36), 3: (20, 24, 28)}[ndim]
    for seed in range(3):
        agrees(lambda device, seed=seed: synthetic(Synthesis(size=size), Preprocess(), (seed,), device))


def test_augmentation(ndim: int) -> None:
    asked = Augment(flip=0.5, rotate90=0.5, rotation_degrees=20, scaling=0.1, translation=0.1, elastic_voxels=4, intensity=0.3, noise=0.1)
    both = pair({2: (32, 32), 3: (14, 20, 20)}[ndim])
    agrees(lambda device: augmented(both.to(device), asked, seeded(1)), tolerance=1e-4)


def registered(ndim: int, images: tuple[Image, Image], device: torch.device, annotations: Annotations | None = None, **sections: Any) -> Registered:
    """By the network that comes with regtool and refinement, as without any option but for what is said; `initial` is a transform."""
    path = bundled_model("pyramid", ndim)
    assert path is not None
    initial = sections.pop("initial", None)
    parameters = Parameters.model_validate({"method": "pyramid", **sections})
    engine = None if "oneshot" in sections else load_model(path, ndim)[0].to(device)
    return register_pair(*images, Setup(parameters=parameters, engine=engine, device=device, initial=initial), Clock(), annotations)


def outcome(found: Registered) -> list[Any]:
    """What comes back, on the host."""
    kept = [float(stage.kept) for stage in found.stages]
    return [found.displacement, found.transform.parts[-1], found.warped, found.start, found.determinant, torch.tensor([*found.similarity, *kept])]


CASES: dict[str, dict[str, Any]] = {
    "guided": {"refine": {"iterations": 3, "dice": 0.5, "landmarks": 0.01}, "metric": {"name": "lncc"}},
    "symmetric": {"refine": {"iterations": 2, "symmetric": True}, "metric": {"name": "mi"}},
    "learned": {"oneshot": {"iterations": 2}, "refine": {"iterations": 0}, "metric": {"name": "ncc"}, "method": "voxelmorph"},
    "part": {"refine": {"iterations": 3}, "metric": {"name": "lncc"}},
    "channels": {"refine": {"iterations": 3}, "metric": {"name": "mind", "channel_weights": [1.0, 0.5]}},
}


@pytest.mark.parametrize("case", CASES)
def test_a_registration(ndim: int, case: str) -> None:
    fixed, moving = scene(ndim)
    annotations = None
    if case in ("guided", "learned"):
        masks = [Image((x.data > 0.05).float(), x.grid) for x in (fixed, moving)]
        labels = [Labels((x.data > 0.4).long(), x.grid) for x in (fixed, moving)]
        points = [Landmarks(x.grid.centre + np.eye(ndim) * 3) for x in (fixed, moving)]
        annotations = Annotations(fixed_mask=masks[0], moving_mask=masks[1], labels=(labels[0], labels[1]), landmarks=(points[0], points[1]))
    sections = {**CASES[case], "align": {"method": "center"}}
    if case == "part":
        cut = slice(0, int(0.6 * moving.grid.shape[0]))
        whole = [slice(0, n) for n in moving.grid.shape[1:]]
        moving = Image(moving.data[:, cut], moving.grid.cut([cut, *whole]))
    if case == "channels":
        fixed, moving = (Image(torch.cat([x.data, x.data**2]), x.grid) for x in (fixed, moving))
        sections["initial"] = Transform((smooth_field(fixed.grid.resized([8] * ndim), 1.0, 7),))
    agrees(lambda device: outcome(registered(ndim, (fixed, moving), device, annotations, **sections)), lies=False, tolerance=5e-3)


def test_the_copies_of_a_registration_are_those_that_the_docs_list() -> None:
    """By file of regtool; what is kept from one registration to the next may have been copied before."""
    images = scene(2, 3.0)
    gpu = agrees(lambda device: outcome(registered(2, images, device)), lies=False, tolerance=5e-3)
    found: dict[str, list[int]] = {}
    for event in gpu.events:
        if event.place != "elsewhere" and event.what != "wait":
            found.setdefault(event.place.split(":")[0], [0, 0])[event.what == "to_host"] += 1
    rows = re.findall(r"^\| `(\S+\.py)` \| (\d+) \| (\d+) \| (once)?", GPU_PAGE.read_text(), re.MULTILINE)
    told = {place: [int(there), int(back)] for place, there, back, once in rows if not once}
    once = {place for place, *_, once in rows if once}
    assert {place: counts for place, counts in found.items() if place not in once} == told


@pytest.mark.gpu
def test_a_real_gpu_registers_as_the_cpu_does(ndim: int) -> None:
    images = scene(ndim, 3.0)
    here, there = (registered(ndim, images, device) for device in (CPU, CUDA))
    assert [stage.kept for stage in here.stages] == [stage.kept for stage in there.stages]
    assert there.similarity[1] == pytest.approx(here.similarity[1], abs=0.01)
    assert float((there.displacement.data - here.displacement.data).norm(dim=0).mean()) < 0.2 * min(images[0].grid.spacing)
