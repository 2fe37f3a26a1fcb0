"""What every similarity must do, whatever it is."""

from __future__ import annotations

import importlib

import pytest
import torch

from regtool.config.choices import similarities
from regtool.config.registration import Metric
from regtool.config.schema import Regularization, TrainingSimilarity
from regtool.similarity import REGULARIZATIONS, SIMILARITIES
from regtool.similarity import window as window_module
from tests.conftest import blobs
from tests.similarity import rand, shape_of

MEASURE = Metric(window=3, bins=8)
MULTIMODAL = ("mi", "mind", "ngf", "lg")

gradients = importlib.import_module("regtool.similarity.ngf")


@pytest.fixture(params=sorted(SIMILARITIES))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def pinned(x: torch.Tensor) -> torch.Tensor:
    """With a least and a largest intensity that do not depend on x."""
    ends = torch.zeros_like(x)
    ends.flatten(2)[..., -1] = 1
    free = torch.ones_like(x)
    free.flatten(2)[..., [0, -1]] = 0
    return free * (0.1 + 0.8 * x) + ends


def structure(ndim: int, shift: float = 0.0) -> torch.Tensor:
    """Two soft balls with some texture that moves along, (1, 1, *shape) in about [0, 1]."""
    shape = (26, 24, 28)[:ndim]
    one, two = (blobs(shape, tuple(c + (shift if k == 0 else 0) for k, c in enumerate(centre)), radius) for centre, radius in
                (((9, 11, 12)[:ndim], 5.0), ((17, 14, 16)[:ndim], 3.0)))  # fmt: skip
    x = (torch.arange(shape[0]) - shift).reshape(-1, *[1] * (ndim - 1))
    return (torch.from_numpy(0.6 * one + 0.3 * two) + 0.05 * torch.sin(1.3 * x) * torch.sin(0.9 * torch.arange(shape[-1]))).clamp(0, 1.5)[None, None]


def test_names_are_those_of_the_parameter_file() -> None:
    assert set(SIMILARITIES) == set(similarities())
    for name in SIMILARITIES:
        assert Metric(name=name.upper()).name == TrainingSimilarity(name=name).name == name
    with pytest.raises(ValueError, match="did you mean 'lncc'"):
        Metric(name="lnc")
    assert set(REGULARIZATIONS) == set(Regularization.model_fields)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("chunk", [1, 1 << 18])
def test_gradients(ndim: int, name: str, weighted: bool, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window_module, "CHUNK", chunk)
    monkeypatch.setattr(gradients, "_edge", lambda *_: 0.3)  # no gradient goes through it
    shape = (4, 3, 5)[:ndim]
    a, b = (rand(1, 2, *shape, seed=s, dtype=torch.float64).requires_grad_() for s in (1, 2))
    weight = rand(1, 1, *shape, seed=3, dtype=torch.float64) if weighted else None
    assert torch.autograd.gradcheck(lambda x, y: SIMILARITIES[name](pinned(x), pinned(y), MEASURE, weight), (a, b), fast_mode=chunk == 1)
    assert torch.autograd.gradcheck(lambda y: SIMILARITIES[name](pinned(a.detach()), pinned(y), MEASURE, weight), (b,), fast_mode=True)


def test_constant_images_give_finite_gradients(name: str, ndim: int) -> None:
    a = torch.full((1, 1, *shape_of(ndim)), 3.0)
    b = torch.full((1, 1, *shape_of(ndim)), 2.0, requires_grad=True)
    for fixed in (a, rand(*a.shape)):
        value = SIMILARITIES[name](fixed, b, TrainingSimilarity())
        value.backward()
        assert b.grad is not None
        assert torch.isfinite(b.grad).all()
        if fixed is a:
            assert float(value.detach()) == pytest.approx(-1 if name == "mse" else 0, abs=1e-6)


@pytest.mark.parametrize("shape", [(1, 9, 8), (7, 1, 1), (1, 1, 1), (2, 2, 2), (3, 1, 12)], ids=str)
def test_thin_images(name: str, ndim: int, shape: tuple[int, ...]) -> None:
    a, b = (rand(2, 1, *shape[:ndim], seed=s) for s in (1, 2))
    b.requires_grad_()
    value = SIMILARITIES[name](a, b, TrainingSimilarity())
    value.backward()
    assert b.grad is not None
    assert torch.isfinite(b.grad).all()
    assert torch.isfinite(value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(name: str, ndim: int, dtype: torch.dtype) -> None:
    a, b = (rand(1, 1, *shape_of(ndim), seed=s).to(dtype) for s in (1, 2))
    value = SIMILARITIES[name](a, b.requires_grad_(), TrainingSimilarity())
    value.backward()
    assert value.dtype == torch.float32
    assert float(value.detach()) == pytest.approx(float(SIMILARITIES[name](a.double(), b.detach().double(), TrainingSimilarity())), abs=1e-5)


def test_a_weight_of_ones_changes_nothing(name: str, ndim: int) -> None:
    a, b = (rand(2, 2, *shape_of(ndim), seed=s, dtype=torch.float64) for s in (1, 2))
    ones = torch.full((2, 1, *shape_of(ndim)), 3.0)
    assert float(SIMILARITIES[name](a, b, MEASURE, ones)) == pytest.approx(float(SIMILARITIES[name](a, b, MEASURE)))


def test_what_has_no_weight_does_not_count(name: str, ndim: int) -> None:
    shape = (14, 6, 7)[:ndim]
    a, b, noise = (rand(1, 1, *shape, seed=s, dtype=torch.float64) for s in (1, 2, 3))
    weight = torch.zeros(1, 1, *shape)
    weight[:, :, :6] = 1
    far = (torch.arange(14) >= 10).reshape(-1, *[1] * (ndim - 1))  # farther than any neighbourhood that is looked at: windows of 3, patches at 2
    c, d = torch.where(far, 100 * noise, a), torch.where(far, 50 * noise.flip(2), b).requires_grad_()
    if name == "lncc":  # takes off the mean of the whole volume first
        c, d = torch.where(far, noise, a), torch.where(far, noise.flip(2), b).requires_grad_()
    value = SIMILARITIES[name](c, d, MEASURE, weight)
    assert float(value.detach()) == pytest.approx(float(SIMILARITIES[name](a, b, MEASURE, weight)), abs=1e-9)
    value.backward()
    assert d.grad is not None
    assert float(d.grad[:, :, 10:].abs().max()) < 1e-12
    nothing = SIMILARITIES[name](a, b, MEASURE, torch.zeros_like(weight))
    assert float(nothing) == 0


def test_aligned_is_best(name: str, ndim: int) -> None:
    fixed = structure(ndim)
    values = [float(SIMILARITIES[name](fixed, structure(ndim, shift), TrainingSimilarity())) for shift in (0.0, 1.0, 2.0, 3.0)]
    assert values[0] > values[1] > max(values[2:]), values


@pytest.mark.parametrize("contrast", ["inverted", "bent"])
def test_aligned_is_best_across_modalities(ndim: int, contrast: str) -> None:
    fixed = structure(ndim)
    for name in MULTIMODAL:
        values = []
        for shift in (0.0, 1.0, -1.0, 2.0, -2.0):
            moved = structure(ndim, shift)
            other = 1 - moved if contrast == "inverted" else 1 / (0.3 + 3 * (moved - 0.1) ** 2)
            values.append(float(SIMILARITIES[name](fixed, other, TrainingSimilarity())))
        assert max(values[1:]) < values[0], (name, values)


def test_following_the_gradient_aligns(name: str, ndim: int) -> None:
    """Gradient ascent on a shift of half a voxel, by linear interpolation between two shifted images."""
    fixed, near, far = structure(ndim), structure(ndim), structure(ndim, 1.0)
    way = torch.tensor(0.5, requires_grad=True)
    SIMILARITIES[name](fixed, torch.lerp(near, far, way), TrainingSimilarity()).backward()
    assert way.grad is not None
    assert float(way.grad) < 0
