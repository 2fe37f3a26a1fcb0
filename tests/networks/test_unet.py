"""The published network: its size, its padding, and the whole of it once more in plain numpy and scipy from the published arrays."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate

from regtool.geometry.sampling import warp_labels
from regtool.geometry.transforms import DisplacementField, Transform
from regtool.io.images import read_image, read_labels
from regtool.methods.model_file import load_model
from regtool.methods.voxelmorph import DECODER, ENCODER
from regtool.networks.blocks import SameConv, UpConv, at_multiple, double
from regtool.networks.unet import UNet
from regtool.workflows.models import import_keras
from tests.conftest import DATA

PUBLISHED = DATA / "published_weights" / "cvpr2018_vm2_cc.h5"
Layers = list[tuple[np.ndarray, np.ndarray]]


def unet(ndim: int, variant: str, half_resolution: bool = False) -> UNet:
    return UNet(ndim, 2, ndim, ENCODER, DECODER[variant], half_resolution=half_resolution)


@pytest.mark.parametrize(("ndim", "variant", "count"), [(3, "vm1", 259_675), (3, "vm2", 300_547), (2, "vm1", 86_658), (2, "vm2", 100_242)])
def test_size_is_the_published_one(ndim: int, variant: str, count: int) -> None:
    assert sum(p.numel() for p in unet(ndim, variant).parameters()) == count


def test_starting_weights(ndim: int) -> None:
    net = unet(ndim, "vm2")
    assert 0 < float(net.head.weight.detach().abs().max()) < 1e-4
    assert all(not bool(p.any()) for name, p in net.named_parameters() if name.endswith("bias"))
    weight = net.up[0].weight.detach()
    assert float(weight.std()) == pytest.approx(np.sqrt(2 / (64 * 3**ndim)), rel=0.05)


def naive_same(x: np.ndarray, kernel: np.ndarray, bias: np.ndarray, stride: int) -> np.ndarray:
    """TensorFlow's 'same': output i looks at inputs i * stride + k - before. x: (*shape, I); kernel: (3, ..., I, O) as Keras stores it."""
    shape, ndim = x.shape[:-1], x.ndim - 1
    out_shape = [-(-n // stride) for n in shape]
    before = [max((o - 1) * stride + 3 - n, 0) // 2 for o, n in zip(out_shape, shape, strict=True)]
    out = np.zeros((*out_shape, kernel.shape[-1])) + bias
    for at in itertools.product(*map(range, out_shape)):
        for k in itertools.product(range(3), repeat=ndim):
            source = tuple(i * stride + j - b for i, j, b in zip(at, k, before, strict=True))
            if all(0 <= s < n for s, n in zip(source, shape, strict=True)):
                out[at] += x[source] @ kernel[k]
    return out


def torch_kernel(kernel: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(kernel, (-1, -2), (0, 1))))


@pytest.mark.parametrize("stride", [1, 2])
def test_padding_is_tensorflows(ndim: int, stride: int) -> None:
    rng = np.random.default_rng(0)
    shape = (6, 5, 1)[-ndim:]  # even, odd, single
    x, kernel, bias = rng.standard_normal((*shape, 2)), rng.standard_normal((*[3] * ndim, 2, 3)), rng.standard_normal(3)
    conv = SameConv(ndim, 2, 3, stride).double()
    with torch.no_grad():
        conv.weight.copy_(torch_kernel(kernel))
        conv.bias.copy_(torch.from_numpy(bias))
        out = conv(torch.from_numpy(np.moveaxis(x, -1, 0)[None]))
    assert np.allclose(np.moveaxis(out[0].numpy(), 0, -1), naive_same(x, kernel, bias, stride), atol=1e-12)


def test_up_convolution_is_repetition_then_convolution(ndim: int) -> None:
    up = UpConv(ndim, 5, 4).double()
    same = SameConv(ndim, 5, 4).double()
    same.load_state_dict(up.state_dict())
    below, skip = torch.rand(2, 3, *(3, 4, 1)[:ndim]).double(), torch.rand(2, 2, *(6, 8, 2)[:ndim]).double()
    below.requires_grad_()
    out, expected = up(below, skip), same(torch.cat([double(below), skip], dim=1))
    assert torch.allclose(out, expected, atol=1e-12)
    weights = torch.rand_like(out)
    grads = torch.autograd.grad((out * weights).sum(), [below, up.weight, up.bias])
    others = torch.autograd.grad((expected * weights).sum(), [below, same.weight, same.bias])
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(grads, others, strict=True))


def reference(images: np.ndarray, layers: Layers) -> np.ndarray:
    """The published graph. images: (*shape, 2) moving, fixed; layers: Keras (kernel, bias) in order. Returns (*shape, D), array axes first."""

    def conv(x: np.ndarray, stride: int = 1, linear: bool = False) -> np.ndarray:
        kernel, bias = next(remaining)
        y = np.zeros((*x.shape[:-1], kernel.shape[-1]))
        for i, o in itertools.product(range(kernel.shape[-2]), range(kernel.shape[-1])):
            y[..., o] += correlate(x[..., i], kernel[..., i, o], mode="constant")
        if stride == 2:  # an even axis has its one zero at the end: output i is centred on input 2 i + 1
            y = y[tuple([slice(1, None, 2)] * (x.ndim - 1))]
        y += bias
        return y if linear else np.where(y > 0, y, 0.2 * y)

    def up(x: np.ndarray) -> np.ndarray:
        for axis in range(x.ndim - 1):
            x = x.repeat(2, axis)
        return x

    remaining = iter(layers)
    x1 = conv(images, 2)
    x2 = conv(x1, 2)
    x3 = conv(x2, 2)
    x = conv(conv(x3, 2))
    for skip in (x3, x2, x1):
        x = conv(np.concatenate([up(x), skip], -1))
    x = np.concatenate([up(conv(x)), images], -1)
    for _ in range(len(layers) - 10):
        x = conv(x)
    return conv(x, linear=True)


def as_ours(flow: np.ndarray) -> np.ndarray:
    return np.moveaxis(flow, -1, 0)[::-1]  # component 0 is the last axis


def images_of(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random((*shape, 2)).astype(np.float32)


def predicted(model: Path, images: np.ndarray) -> np.ndarray:
    engine, _ = load_model(model, images.ndim - 1)
    moving, fixed = (torch.from_numpy(images[..., k].copy())[None, None] for k in range(2))
    with torch.inference_mode():
        return engine.displacement(fixed, moving)[0].numpy()


def write_keras(path: Path, layers: Layers, bare: bool) -> Path:
    """As Keras saves a whole model, or (bare) its weights alone."""
    import h5py

    with h5py.File(path, "w") as file:
        group = file if bare else file.create_group("model_weights")
        names = ["input_1", *[f"conv_{k}" for k in range(len(layers))]]
        group.attrs["layer_names"] = [n.encode() for n in names]
        group.create_group("input_1").attrs["weight_names"] = []
        for name, (kernel, bias) in zip(names[1:], layers, strict=True):
            part = group.create_group(name)
            part.attrs["weight_names"] = [f"{name}/kernel:0".encode(), f"{name}/bias:0".encode()]
            part[f"{name}/kernel:0"], part[f"{name}/bias:0"] = kernel, bias
    return path


def random_layers(ndim: int, variant: str) -> Layers:
    rng = np.random.default_rng(1)
    out = []
    for p in unet(ndim, variant).parameters():
        shape = tuple(p.shape)
        if len(shape) > 1:
            scale = np.sqrt(2 / np.prod(shape[1:]))
            out.append([np.moveaxis(rng.standard_normal(shape) * scale, (0, 1), (-1, -2)).astype(np.float32)])
        else:
            out[-1].append((0.1 * rng.standard_normal(shape)).astype(np.float32))
    return [(k, b) for k, b in out]


@pytest.mark.parametrize("variant", ["vm1", "vm2"])
def test_import_reproduces_the_published_graph(ndim: int, variant: str, tmp_path: Path) -> None:
    layers = random_layers(ndim, variant)
    card = import_keras(write_keras(tmp_path / "w.h5", layers, bare=variant == "vm1"), tmp_path / "m.safetensors")
    assert (card["parameters"]["engine"]["variant"], card["dimension"]) == (variant, ndim)
    images = images_of((16, 32, 16)[:ndim], seed=2)
    expected = as_ours(reference(images, layers))
    assert np.abs(expected).max() > 0.1
    assert np.abs(predicted(tmp_path / "m.safetensors", images) - expected).max() < 1e-3


@pytest.mark.data
def test_published_weights(tmp_path: Path) -> None:
    import h5py

    with h5py.File(PUBLISHED, "r") as file:
        group = file["model_weights"]
        found = [np.asarray(group[layer][w]) for layer in group.attrs["layer_names"] for w in group[layer].attrs["weight_names"]]
    import_keras(PUBLISHED, tmp_path / "m.safetensors")
    images = images_of((32, 16, 16), seed=3)
    expected = as_ours(reference(images, list(zip(found[::2], found[1::2], strict=True))))
    assert np.abs(expected).max() > 0.5
    assert np.abs(predicted(tmp_path / "m.safetensors", images) - expected).max() < 1e-3


def test_any_size_is_padded_and_cropped(ndim: int) -> None:
    seen = []

    def network(x: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(x.shape[2:]))
        return 2 * x

    x = torch.rand(1, 2, *(1, 17, 32)[-ndim:])
    assert torch.equal(at_multiple(network, x, 16), 2 * x)
    assert seen == [(16, 32, 32)[-ndim:]]


def test_half_resolution(ndim: int) -> None:
    out = unet(ndim, "vm2", half_resolution=True)(torch.rand(1, 2, *[32] * ndim))
    assert out.shape == (1, ndim, *[16] * ndim)


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize(("fixed", "moving", "expected"), [(1, 2, 0.712), (2, 1, 0.715)])
def test_published_accuracy(fixed: int, moving: int, expected: float, tmp_path: Path) -> None:
    """Mean Dice of the 30 structures (0.522 before), intensities as they are in the files: FreeSurfer's / 255."""
    folder = DATA / "brain3d_pair"
    import_keras(PUBLISHED, tmp_path / "m.safetensors")
    engine, _ = load_model(tmp_path / "m.safetensors", 3)
    f, m = (read_image(folder / f"subject{k}.nii.gz") for k in (fixed, moving))
    with torch.inference_mode():
        u = engine.displacement(f.data[None], m.data[None])
    a, b = (read_labels(folder / f"subject{k}_labels.nii.gz") for k in (fixed, moving))
    warped = warp_labels(b, Transform((DisplacementField.from_voxels(u, f.grid),)), a.grid, vote=False)
    labels = [int(word) for word in (folder / "evaluated_labels.txt").read_text().split()]
    dice = [float(2 * ((a.data == k) & (warped.data == k)).sum() / ((a.data == k).sum() + (warped.data == k).sum())) for k in labels]
    assert np.mean(dice) == pytest.approx(expected, abs=0.005)
