"""DIRNet: its size, its network once more in plain numpy and scipy, its variants."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate
from torch import nn

from regtool import methods as engines
from regtool.config.toml import merged
from regtool.deformation.bspline import bspline
from regtool.errors import ParameterError
from regtool.geometry.jacobian import min_one_sided_jacobian
from regtool.methods import load
from regtool.networks.regressor import BatchNorm, Regressor

DIRNet = load("dirnet")

VARIANTS = ["baseline", "a1", "a2", "b1", "b2", "c1", "c2"]
FITTING = [(v, n) for v, n in itertools.product(VARIANTS, (2, 3)) if (v, n) != ("b2", 3)]


def made(ndim: int, size: tuple[int, ...] | None = None, wild: float = 0.0, **settings: Any) -> DIRNet:
    """In prediction mode; `wild`: how far its weights and running averages are from fresh ones."""
    parameters = engines.read_parameters(None, merged({"method": "dirnet"}, {"grid": {"size": list(size)}} if size else {}))
    torch.manual_seed(0)
    engine = engines.build(parameters.model_copy(update={"engine": settings}), ndim)
    assert isinstance(engine, DIRNet)
    with torch.no_grad():
        for tensor in engine.state_dict().values():
            tensor.add_(wild * (2 * torch.rand_like(tensor) - 1))
    return engine.eval()


def count(engine: nn.Module) -> int:
    return sum(p.numel() for p in engine.parameters())


def test_size_is_the_published_one() -> None:
    assert count(made(2)) == 8_034
    assert count(made(3)) == 22_451
    convolution, whole = 16 * 16 * 9 + 16 + 32, 2 * (16 * 17 + 32) + 34
    assert count(made(2, variant="c1")) == 8_034 + 2 * convolution
    assert count(made(2, variant="a2")) == 8_034 + 4 * (16 * 16 * 4 + 16 + 32)
    dense = 2 * (1024 * 1024 + 1024 + 2 * 1024) + 1024 * 512 + 512
    assert count(made(2, (256, 256), variant="c2")) == 8_034 - whole + convolution + dense


def test_defaults_are_the_papers() -> None:
    parameters = engines.read_parameters(None, {"method": "dirnet"})
    assert parameters.training_similarity.name == "ncc"
    assert not any(weight for _, weight in parameters.regularization)
    assert (parameters.train.batch_size, parameters.train.steps) == (32, 10_000)


def plain_layer(x: np.ndarray, layer: nn.Module) -> np.ndarray:
    """(I, *shape) through a convolution, batch normalisation by its averages, and an ELU."""
    conv, norm = layer[0], layer[1]  # type: ignore[index]
    x = plain_conv(x, conv)
    scale, shift, mean, variance = (
        t.detach().double().numpy().reshape(-1, *[1] * (x.ndim - 1)) for t in (norm.weight, norm.bias, norm.mean, norm.variance)
    )
    x = (x - mean) / np.sqrt(variance + 1e-5) * scale + shift
    return np.where(x > 0, x, np.expm1(np.minimum(x, 0)))


def plain_conv(x: np.ndarray, conv: nn.Module) -> np.ndarray:
    kernel, bias = (p.detach().double().numpy() for p in (conv.weight, conv.bias))
    return np.stack([sum(correlate(a, k, mode="constant") for a, k in zip(x, row, strict=True)) + b for row, b in zip(kernel, bias, strict=True)])


def plain_pool(x: np.ndarray) -> np.ndarray:
    blocks = x.reshape(x.shape[0], *itertools.chain.from_iterable((n // 2, 2) for n in x.shape[1:]))
    return blocks.mean(axis=tuple(range(2, blocks.ndim, 2)))


@pytest.mark.parametrize(("downsamplings", "variant"), [(4, "baseline"), (2, "baseline"), (2, "c1")])
def test_the_network_in_plain_numpy(ndim: int, downsamplings: int, variant: str) -> None:
    engine = made(ndim, wild=0.1, downsamplings=downsamplings, variant=variant)
    fixed, moving = torch.rand(2, 1, 1, *(32, 16, 16)[:ndim])
    x = np.stack([moving[0, 0].double().numpy(), fixed[0, 0].double().numpy()])
    layers = [m for m in engine.network.features if isinstance(m, nn.Sequential)]
    last = downsamplings - 1
    pooled_after = [0, 1, 2, 3][:downsamplings] if variant == "baseline" else [*range(last), downsamplings]
    for i, layer in enumerate(layers):
        x = plain_layer(x, layer)
        x = plain_pool(x) if i in pooled_after else x
    assert len(layers) == (6 if variant == "baseline" else 8)
    control = torch.from_numpy(plain_conv(x, engine.network.head))
    assert control.shape == (ndim, *(n // 2**downsamplings for n in fixed.shape[2:]))
    with torch.no_grad():
        u = engine.displacement(fixed, moving)
    assert float(u.abs().max()) > 0.01
    torch.testing.assert_close(u[0].double(), bspline(control[None], 2**downsamplings)[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("variant", "ndim"), FITTING)
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_every_variant_starts_at_zero_and_learns(variant: str, ndim: int, norm: str) -> None:
    shape = (35, 18, 21)[:ndim]
    engine = made(ndim, shape[::-1], variant=variant, norm=norm, downsamplings=2).train()
    fixed, moving = torch.rand(2, 2, 1, *shape)
    u = engine.displacement(fixed, moving)
    assert u.shape == (2, ndim, *shape)
    assert not bool(u.any())
    optimiser = torch.optim.Adam(engine.parameters(), lr=1e-3)
    for _ in range(2):  # the head is zero at first, so that what is below it hears nothing
        optimiser.zero_grad()
        (engine.displacement(fixed, moving) - 1).square().mean().backward()
        optimiser.step()
    silent = [n for n, p in engine.named_parameters() if p.grad is None or (not bool(p.grad.any()) and "0.bias" not in n)]
    assert not silent  # a bias before a batch normalisation has none
    assert float(engine.displacement(fixed, moving).detach().mean()) > 1e-3


def reached(variant: str) -> int:
    """Voxels whose intensity the control point in the middle of a line through the image depends on."""
    engine = made(2, (160, 160), wild=0.1, variant=variant)
    fixed = torch.rand(1, 1, 160, 160, requires_grad=True)
    engine.network(torch.cat([fixed, fixed], dim=1))[0, 0, 5, 5].backward()
    assert fixed.grad is not None
    return int((fixed.grad.abs().amax(dim=(0, 1, 2)) > 0).sum())


def test_patches_are_as_large_as_the_layers_make_them() -> None:
    assert reached("baseline") == 16 + 2 * (1 + 2 + 4 + 8)
    assert reached("a2") == 16 + 2 * (1 + 2 + 4 + 8)
    assert reached("c1") == 16 + 2 * (1 + 2 + 4 + 8) + 2 * (8 + 16)
    assert reached("c2") == 160


def test_any_number_of_downsamplings(ndim: int) -> None:
    for downsamplings, convolutions in ((1, 6), (2, 6), (5, 7)):
        network = made(ndim, downsamplings=downsamplings).network
        assert sum(isinstance(m, nn.Sequential) for m in network.features) == convolutions
        x = torch.rand(1, 2, *[32] * ndim)
        assert network(x).shape == (1, ndim, *[32 // 2**downsamplings] * ndim)
    assert made(2, downsamplings=2).network(torch.rand(1, 2, 28, 28)).shape == (1, 2, 7, 7)  # the paper's digits


def test_variants_that_cannot_be(ndim: int) -> None:
    with pytest.raises(ParameterError, match=r"method dirnet, variant c2 looks at the whole image: say grid\.size"):
        made(ndim, variant="c2")
    with pytest.raises(ParameterError, match=r"grid\.size"):
        made(ndim, (32,) * (5 - ndim), variant="c2")
    with pytest.raises(ParameterError, match="b2 is for 2-D images"):
        made(3, variant="b2")
    engine = made(ndim, (33, 16, 20)[:ndim], variant="c2", downsamplings=2)
    with pytest.raises(ParameterError, match="made for images of 33 x 16"):
        engine.displacement(*torch.rand(2, 1, 1, *[16] * ndim))


def test_the_limit_forbids_folds(ndim: int) -> None:
    images = torch.rand(2, 1, 1, *[24] * ndim)
    for limit, folds in ((True, False), (False, True)):
        engine = made(ndim, downsamplings=2, diffeomorphic_limit=limit)
        with torch.no_grad():
            engine.network.head.weight.normal_(std=1e4, generator=torch.Generator().manual_seed(0))
            u = engine.displacement(*images)
        assert bool((min_one_sided_jacobian(u[0]) <= 0).any()) == folds


def test_edge_of_the_field() -> None:
    for edge, border in (("replicate", 1.0), ("zero", 0.52)):
        engine = made(2, edge=edge)
        with torch.no_grad():
            engine.network.head.bias.fill_(2.0)
            u = engine.displacement(*torch.rand(2, 1, 1, 80, 80))
        assert float(u[0, 0, 40, 0]) == pytest.approx(2 * border, abs=0.02)


@pytest.mark.parametrize("shape", [(3, 16), (2, 16, 5, 4), (1, 16, 3, 4, 5), (1, 16, 1, 1)])
def test_batch_norm(shape: tuple[int, ...]) -> None:
    ours = BatchNorm(16)
    theirs: nn.Module = {2: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)](16)
    single = np.prod(shape) == 16
    theirs.train(not single)  # a single value has no statistics
    for seed in range(3):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3 + 1
        torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_group_norm_sees_one_sample_at_a_time() -> None:
    engine = made(2, wild=0.1, norm="group", downsamplings=2).train()
    fixed, moving = torch.rand(2, 3, 1, 32, 32)
    with torch.no_grad():
        together = engine.displacement(fixed, moving)
        torch.testing.assert_close(together[1:2], engine.displacement(fixed[1:2], moving[1:2]), atol=1e-5, rtol=1e-5)


def test_lower_precision_ends_before_the_head() -> None:
    network = Regressor(2, 2, 2, downsamplings=2)
    with torch.no_grad():
        network.head.bias.fill_(1 / 3)
        with torch.autocast("cpu", torch.bfloat16):
            control = network.eval()(torch.rand(1, 2, 16, 16))
    assert control.dtype == torch.float32
    torch.testing.assert_close(control, torch.full_like(control, 1 / 3))
