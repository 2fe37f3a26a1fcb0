"""Ferrante et al. 2018: the network once more in plain steps, where a coarse displacement lands on the fine grid, any size, learning on a pair."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import map_coordinates, uniform_filter

from regtool import methods as engines
from regtool.config.toml import merged
from regtool.deformation.dense import dense
from regtool.methods import load
from regtool.networks.blocks import CONVOLVE, SameConv, UpsampleConv, average_pool, double, in_float32
from regtool.networks.summing_unet import SummingUNet
from regtool.preprocessing.batch import Batch
from tests.conftest import blobs

PooledUNet = load("unet")


def made(ndim: int, *settings: dict[str, Any]) -> PooledUNet:
    torch.manual_seed(0)
    engine = engines.build(engines.read_parameters(None, merged({"method": "unet"}, *settings)), ndim)
    assert isinstance(engine, PooledUNet)
    return engine


def stirred(module: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return module


def plain(net: SummingUNet, x: torch.Tensor, groups: int | None) -> torch.Tensor:
    """The graph of the authors' code in its own order: pre-activations are kept, doubled features convolved, added, activated."""

    def conv(x: torch.Tensor, layers: torch.nn.Module) -> torch.Tensor:
        weights = list(layers.state_dict().values())
        x = CONVOLVE[x.dim() - 2](x, weights[0], weights[1], padding=1)
        return x if groups is None else F.group_norm(x, groups, *weights[2:])

    kept = []
    for level, pair in enumerate(net.down):
        x = conv(F.elu(conv(x, pair[0])), pair[2])
        if level < 3:
            kept.append(x)
            x = torch.from_numpy(uniform_filter(F.elu(x).numpy(), (0, 0, *[2] * (x.dim() - 2)), origin=(0, 0, *[-1] * (x.dim() - 2))))
            x = x[(slice(None), slice(None), *[slice(None, None, 2)] * (x.dim() - 2))]
    x = F.elu(x)
    for up, pair in zip(net.up, net.fine, strict=True):
        x = F.elu(conv(double(x), up) + kept.pop())
        x = F.elu(conv(F.elu(conv(x, pair[0])), pair[2]))
    return CONVOLVE[x.dim() - 2](x, net.head.weight, net.head.bias, padding=1)


@pytest.mark.parametrize("norm", ["none", "group"])
def test_skips_are_summed_before_the_activation(ndim: int, norm: str) -> None:
    torch.manual_seed(0)
    net = stirred(SummingUNet(ndim, 2, ndim, (16, 32, 64, 128), norm=norm, dropout=0.0)).eval().double()
    assert isinstance(net, SummingUNet)
    x = torch.rand(2, 2, *(16, 8, 8)[:ndim]).double()
    with torch.no_grad():
        assert torch.allclose(net(x), plain(net, x, 8 if norm == "group" else None), atol=1e-9)
        assert float(net(x).abs().max()) > 0.01


@pytest.mark.parametrize(("ndim", "norm", "count"), [(2, "none", 487_538), (3, "none", 1_461_411), (2, "batch", 489_170), (2, "group", 489_170)])
def test_size(ndim: int, norm: str, count: int) -> None:
    assert sum(p.numel() for p in made(ndim, {"engine": {"norm": norm}}).parameters()) == count


def test_upsampling_convolution_is_repetition_then_convolution(ndim: int) -> None:
    up, same = UpsampleConv(ndim, 3, 4).double(), SameConv(ndim, 3, 4).double()
    same.load_state_dict(stirred(up).state_dict())
    x = torch.rand(2, 3, *(3, 4, 1)[:ndim]).double()
    assert torch.allclose(up(x), same(double(x)), atol=1e-12)


@pytest.mark.parametrize("levels", [0, 1, 2, 3])
def test_the_network_sees_pooled_images(ndim: int, levels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, seen = made(ndim, {"engine": {"pooling_levels": levels}}), []
    forward = engine.network.forward
    monkeypatch.setattr(engine.network, "forward", lambda x: seen.append(x) or forward(x))
    shape = (64, 1, 20)[:ndim]
    fixed, moving = torch.rand(2, 2, 1, *shape)
    with torch.inference_mode():
        assert engine.displacement(fixed, moving).shape == (2, ndim, *shape)
    step = 2**levels
    assert tuple(seen[0].shape[2:]) == tuple(-(-n // (8 * step)) * 8 for n in shape)
    block = (slice(0, step), slice(0, 1), slice(0, step))[:ndim]
    assert torch.allclose(seen[0][0, :, *[0] * ndim], torch.stack([i[0, 0][block].mean() for i in (moving, fixed)]), atol=1e-6)


@pytest.mark.parametrize("levels", [0, 1, 2, 3])
def test_a_constant_grows_by_the_pooling(ndim: int, levels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = made(ndim, {"engine": {"pooling_levels": levels}})
    c = torch.tensor([1.5, -0.25, 2.0][:ndim]).reshape(1, -1, *[1] * ndim)
    monkeypatch.setattr(engine.network, "forward", lambda x: c.expand(len(x), ndim, *x.shape[2:]))
    u = engine.displacement(*torch.rand(2, 1, 1, *(19, 40, 7)[:ndim]))
    assert torch.allclose(u, (2**levels * c).expand_as(u), atol=1e-5)


def test_enlarging_is_edge_to_edge(ndim: int) -> None:
    coarse, shape = (3, 4, 2)[:ndim], (12, 16, 8)[:ndim]
    u = torch.rand(2, ndim, *coarse, dtype=torch.float64)
    at = np.meshgrid(*[(np.arange(n) + 0.5) / 4 - 0.5 for n in shape], indexing="ij")
    expected = [[4 * map_coordinates(component.numpy(), at, order=1, mode="nearest") for component in sample] for sample in u]
    assert np.allclose(dense(u, shape).numpy(), np.array(expected), atol=1e-10)
    assert torch.equal(dense(u, coarse), u)


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_pooling_and_enlarging_agree_on_positions(ndim: int, levels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images that hold their own coordinate, handed through: inside, the displacement is 2^l times the coordinate of the very voxel."""
    engine, step = made(ndim, {"engine": {"pooling_levels": levels}}), 2**levels
    monkeypatch.setattr(engine.network, "forward", lambda x: x[:, :1].expand(-1, ndim, *x.shape[2:]))
    shape = (16 * step,) + (8 * step,) * (ndim - 1)
    ramp = torch.arange(shape[0]).float().reshape(-1, *[1] * (ndim - 1)).expand(shape)[None, None]
    u = engine.displacement(torch.zeros_like(ramp), ramp)
    inside = slice(step, -step)
    assert torch.allclose(u[:, :1, inside], step * ramp[:, :, inside], rtol=1e-5)


def test_dropout_acts_while_learning_only() -> None:
    engine = made(2, {"engine": {"dropout": 0.5}})
    stirred(engine)
    images = torch.rand(2, 1, 1, 32, 32)
    with torch.no_grad():
        assert not torch.equal(engine.train().displacement(*images), engine.displacement(*images))
        assert torch.equal(engine.eval().displacement(*images), engine.displacement(*images))


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
@pytest.mark.parametrize("size", [(32, 32), (1, 7), (8, 16, 32)], ids=str)
def test_a_single_small_pair_can_be_learned_from(norm: str, size: tuple[int, ...]) -> None:
    """At 32 voxels pooled by 4 the coarsest level has a single voxel, of which no batch statistic exists."""
    engine = made(len(size), {"engine": {"norm": norm}}).train()
    terms = engine.losses(Batch(*torch.rand(2, 1, 1, *size)), "registration")
    torch.stack(list(terms.values())).sum().backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in engine.parameters())


def test_batch_normalisation_is_torchs(ndim: int) -> None:
    net = SummingUNet(ndim, 2, ndim, (16, 32), norm="batch", dropout=0.0)
    norm, x = net.down[0][0][1].train(), torch.rand(3, 16, *(4, 5, 6)[:ndim])
    mean, variance = torch.zeros(16), torch.ones(16)
    assert torch.allclose(norm(x), F.batch_norm(x, mean, variance, norm.weight, norm.bias, True, 0.1, 1e-5), atol=1e-6)
    assert torch.allclose(norm.mean, mean)
    assert torch.allclose(norm.eval()(x), F.batch_norm(x, mean, variance, norm.weight, norm.bias, False, 0.1, 1e-5), atol=1e-6)


def test_head_runs_in_float32(ndim: int) -> None:
    head, x = SameConv(ndim, 3, ndim), torch.rand(1, 3, *[4] * ndim)
    assert torch.equal(in_float32(head, x), head(x))
    with torch.autocast("cpu", torch.bfloat16):
        out = in_float32(head, x.bfloat16())
    assert torch.equal(out, head(x.bfloat16().float()))


def test_pooling_by_one_changes_nothing(ndim: int) -> None:
    x = torch.rand(1, 2, *[4] * ndim)
    assert average_pool(x, 1) is x
    assert torch.allclose(average_pool(x, 4).flatten(2)[..., 0], x.flatten(2).mean(dim=2))


def test_a_pair_is_learned(ndim: int) -> None:
    shape = {2: (32, 32), 3: (16, 16, 16)}[ndim]
    engine = made(ndim, {"engine": {"pooling_levels": 1}}).train()
    middle = shape[0] / 2
    fixed, moving = (torch.from_numpy(blobs(shape, (middle + s,) + (middle,) * (ndim - 1), shape[0] / 5))[None, None] for s in (1.5, -1.5))
    optimiser, values = torch.optim.Adam(engine.parameters(), lr=1e-3), []
    for _ in range(30):
        optimiser.zero_grad()
        terms = engine.losses(Batch(fixed, moving), "registration")
        torch.stack(list(terms.values())).sum().backward()
        optimiser.step()
        values.append(-float(terms["ncc"].detach()))
    assert max(values) > 1 - 0.3 * (1 - values[0])


def test_defaults_are_the_papers(ndim: int) -> None:
    parameters = engines.read_parameters(None, {"method": "unet"})
    assert (parameters.training_similarity.name, parameters.train.learning_rate) == ("ncc", 1e-4)
    engine, images = made(ndim), torch.rand(2, 1, 1, *[32] * ndim)
    with torch.no_grad():
        stirred(engine)
        u, terms = engine.displacement(*images), engine.losses(Batch(*images), "registration")
    variation = sum(np.abs(np.diff(u[0].numpy(), axis=axis)).sum(dtype=float) for axis in range(1, ndim + 1))
    assert set(terms) == {"ncc", "tv", "l2"}
    assert float(terms["tv"]) == pytest.approx(1e-6 * variation, rel=1e-3)
    assert float(terms["l2"]) == pytest.approx(1e-6 * np.linalg.norm(u.numpy()) / 32**ndim, rel=1e-3)
