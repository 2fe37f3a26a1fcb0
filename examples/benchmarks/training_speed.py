"""Seconds a training step of VoxelMorph-1 takes, against the same network written plainly: contiguous float32, repeated voxels and concatenation, and
local correlation by dense convolutions.

    python examples/benchmarks/training_speed.py [--shape 160 192 224] [--steps 3]

Both make the same step on the same weights and images; the largest difference of their gradients, relative to each gradient's largest entry, is
printed with the times. Run it alone on the machine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from regtool.geometry.sampling import warp_voxels
from regtool.methods import build, read_parameters
from regtool.preprocessing.batch import Batch
from regtool.similarity.lncc import EPSILON


def plain_network(network: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The layers of regtool's UNet one after another, each as its definition says."""

    def same(conv: torch.nn.Module, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
        if stride == 1:
            return F.conv3d(x, conv.weight, conv.bias, padding=1)
        return F.conv3d(F.pad(x, (0, 1) * 3), conv.weight, conv.bias, stride=2)  # 'same' of even sizes

    def up(conv: torch.nn.Module, below: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        return same(conv, torch.cat([F.interpolate(below, scale_factor=2, mode="nearest"), skip], dim=1))

    raw, skips = x, []
    for conv in network.down:
        x = F.leaky_relu(same(conv, x, 2), 0.2)
        skips.append(x)
    x = F.leaky_relu(same(network.bottom, x), 0.2)
    for conv, skip in zip(network.up, skips[-2::-1], strict=True):
        x = F.leaky_relu(up(conv, x, skip), 0.2)
    x = F.leaky_relu(same(network.fine, x), 0.2)
    x = F.leaky_relu(up(network.last_up, x, raw), 0.2)
    for conv in network.full:
        x = F.leaky_relu(same(conv, x), 0.2)
    return same(network.head, x)


def dense_lncc(a: torch.Tensor, b: torch.Tensor, window: int = 9) -> torch.Tensor:
    """Squared local correlation with a dense kernel of ones, means over the voxels each window has."""
    kernel = torch.ones(1, 1, *[window] * 3)
    count = F.conv3d(torch.ones_like(a), kernel, padding=window // 2)

    def mean(x: torch.Tensor) -> torch.Tensor:
        return F.conv3d(x, kernel, padding=window // 2) / count

    a, b = a - a.mean(), b - b.mean()
    ma, mb = mean(a), mean(b)
    va, vb, covariance = mean(a * a) - ma * ma, mean(b * b) - mb * mb, mean(a * b) - ma * mb
    return (covariance**2 / (va.clamp(min=EPSILON) * vb.clamp(min=EPSILON))).mean()


def plain_diffusion(u: torch.Tensor) -> torch.Tensor:
    return sum(u.diff(dim=axis).square().mean() for axis in (2, 3, 4)) / 3


def timed(engine: torch.nn.Module, losses: Callable[[], torch.Tensor], steps: int) -> tuple[float, list[torch.Tensor]]:
    """Median seconds of a forward and backward pass and an Adam step; the gradients."""
    weights = {name: p.detach().clone() for name, p in engine.state_dict().items()}
    seconds, gradients = [], []
    for _ in range(steps):
        engine.load_state_dict(weights)
        optimiser = torch.optim.Adam(engine.parameters(), lr=1e-4)
        engine.zero_grad(set_to_none=True)
        start = time.perf_counter()
        losses().backward()
        optimiser.step()
        seconds.append(time.perf_counter() - start)
        gradients = [p.grad.clone() for p in engine.parameters()]
    engine.load_state_dict(weights)
    return statistics.median(seconds), gradients


def images(shape: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Two smooth textures with a background, as brains have."""
    torch.manual_seed(0)
    grids = torch.meshgrid(*[torch.linspace(-1, 1, n) for n in shape], indexing="ij")
    inside = (sum(g * g for g in grids) < 0.7).float()
    textures = [F.interpolate(torch.rand(1, 1, *[n // 8 for n in shape]), size=shape, mode="trilinear") for _ in range(2)]
    fine = [0.1 * torch.rand(1, 1, *shape) for _ in range(2)]
    return tuple((t + f) * inside for t, f in zip(textures, fine, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs=3, type=int, default=[160, 192, 224])
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    torch.manual_seed(1)
    engine = build(read_parameters(None, {"method": "voxelmorph", "engine": {"variant": "vm1"}, "regularization": {"diffusion": 1.0}}), 3).train()
    with torch.no_grad():  # a field of some voxels, so that gradients are those of a training under way
        engine.network.head.weight.mul_(3e3)
    fixed, moving = images(options.shape)
    batch = Batch(fixed, moving)

    def plain() -> torch.Tensor:
        u = plain_network(engine.network, torch.cat([moving, fixed], dim=1))
        return plain_diffusion(u) - dense_lncc(fixed, warp_voxels(moving, u))

    def ours() -> torch.Tensor:
        return torch.stack(list(engine.losses(batch, "registration").values())).sum()

    fast, gradients = timed(engine, ours, options.steps)
    print(f"regtool: {fast:.2f} s a step", flush=True)
    slow, expected = timed(engine, plain, max(1, options.steps - 2))
    print(f"plain:   {slow:.2f} s a step, {slow / fast:.1f} times as long")
    off = max(float((g - e).abs().max() / e.abs().max()) for g, e in zip(gradients, expected, strict=True))
    print(f"largest relative difference of a gradient: {off:.1e}")


if __name__ == "__main__":
    main()
