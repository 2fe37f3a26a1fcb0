"""Kim et al. 2019: the terms written out with the two networks, where their gradients run, what the ablations leave out, what a model keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import map_coordinates

from regtool import methods as engines
from regtool.config.toml import merged
from regtool.geometry.sampling import warp_voxels
from regtool.methods import cycle, load
from regtool.methods.model_file import load_model, save_model
from regtool.networks.blocks import SameConv
from regtool.preprocessing.batch import Batch
from regtool.similarity.lncc import lncc
from regtool.similarity.mse import mse
from regtool.similarity.regularization import diffusion, map_cycle
from tests.conftest import blobs

Cycle = load("cycle")


def made(ndim: int, *settings: dict[str, Any], stir: float = 0.03, seed: int = 0) -> Cycle:
    """An engine whose weights are stirred so that it moves things by about a voxel."""
    torch.manual_seed(seed)
    engine = engines.build(engines.read_parameters(None, merged({"method": "cycle"}, *settings)), ndim)
    assert isinstance(engine, Cycle)
    with torch.no_grad():
        for p in engine.parameters():
            p.add_(stir * torch.randn_like(p))
    return engine


def pair(ndim: int) -> Batch:
    shape = (16, 12, 16)[:ndim]
    fixed, moving = (torch.from_numpy(blobs(shape, tuple(n / 2 + shift for n in shape), 4.0))[None, None] for shift in (0.5, -1.5))
    return Batch(fixed, moving)


def warped(image: torch.Tensor, displacement: torch.Tensor) -> np.ndarray:
    """By scipy, the border continued outwards."""
    index = np.indices(image.shape[2:]).astype(float) + displacement[0].detach().double().numpy()[::-1]
    return map_coordinates(image[0, 0].detach().double().numpy(), index, order=1, mode="nearest")


def as_image(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array)[None, None].float()


def test_terms_are_those_of_the_paper(ndim: int) -> None:
    engine, batch = (
        made(
            ndim,
            {"regularization": {"diffusion": 0.7}, "engine": {"cycle_weight": 0.3, "identity_weight": 0.4}, "training_similarity": {"window": 5}},
        ),
        pair(ndim),
    )
    assert engine.reverse is not None
    a, b, g_ab, g_ba = batch.moving, batch.fixed, engine.network, engine.reverse
    with torch.no_grad():
        terms = {name: float(term) for name, term in engine.losses(batch, "registration").items()}
        phi_ab, phi_ba = g_ab.displacement(b, a), g_ba.displacement(a, b)
        assert float(phi_ab.abs().mean()) > 0.1
        like_b, like_a = as_image(warped(a, phi_ab)), as_image(warped(b, phi_ba))
        again_a = warped(like_b, g_ba.displacement(like_a, like_b))
        again_b = warped(like_a, g_ab.displacement(like_b, like_a))
        still_a, still_b = as_image(warped(a, g_ab.displacement(a, a))), as_image(warped(b, g_ba.displacement(b, b)))
        expected = {
            "forward_lncc": -lncc(b, like_b, window=5),
            "backward_lncc": -lncc(a, like_a, window=5),
            "forward_diffusion": 0.7 * diffusion(phi_ab),
            "backward_diffusion": 0.7 * diffusion(phi_ba),
            "cycle": 0.3 * (np.abs(again_a - a[0, 0].numpy()).mean() + np.abs(again_b - b[0, 0].numpy()).mean()),
            "identity": -0.4 * (lncc(a, still_a, window=5) + lncc(b, still_b, window=5)),
        }
    assert terms == pytest.approx({name: float(value) for name, value in expected.items()}, abs=2e-5)


def test_defaults_are_the_papers() -> None:
    parameters = engines.read_parameters(None, {"method": "cycle"})
    settings = engines.engine_section(parameters)
    assert settings is not None
    assert settings.model_dump() == {
        "variant": "vm1", "integration_steps": 0, "shared": False, "cycle": "image", "cycle_weight": 0.1, "identity_weight": 0.5, "init": "he",
    }  # fmt: skip
    assert (parameters.training_similarity.name, parameters.regularization.diffusion, parameters.train.learning_rate) == ("lncc", 1.0, 1e-4)


def gradients(engine: Cycle, loss: torch.Tensor) -> list[torch.Tensor]:
    return [torch.zeros(1) if g is None else g for g in torch.autograd.grad(loss, list(engine.parameters()), allow_unused=True)]


def test_gradient_runs_through_both_passes_and_both_warps(ndim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, batch = made(ndim, {"engine": {"cycle_weight": 1}}), pair(ndim)
    engine.double()
    batch = Batch(batch.fixed.double(), batch.moving.double())
    whole = gradients(engine, engine.losses(batch, "registration")["cycle"])

    weight = engine.network.head.weight  # against finite differences, of a weight that takes part in both passes
    at = tuple(int(i) for i in np.unravel_index(int(whole[_position(engine, weight)].abs().argmax()), weight.shape))
    values = []
    for step in (-1e-6, 1e-6):
        with torch.no_grad():
            weight[at] += step
            values.append(float(engine.losses(batch, "registration")["cycle"]))
            weight[at] -= step
    slope = (values[1] - values[0]) / 2e-6
    assert float(whole[_position(engine, weight)][at]) == pytest.approx(slope, rel=1e-3)

    calls = []

    def cut(image: torch.Tensor, displacement: torch.Tensor, outside: float | None = None) -> torch.Tensor:
        calls.append(image)
        out = warp_voxels(image, displacement, outside)
        return out.detach() if len(calls) <= 2 else out

    monkeypatch.setattr("regtool.geometry.sampling.warp_voxels", cut)
    engine.__class__ = cycle.engine()  # the same one, with another warp
    severed = gradients(engine, engine.losses(batch, "registration")["cycle"])
    assert len(calls) >= 4
    difference = max(float((s - w).abs().max()) for s, w in zip(severed, whole, strict=True))
    assert difference > 0.01 * max(float(w.abs().max()) for w in whole)


def _position(engine: Cycle, parameter: torch.Tensor) -> int:
    return next(i for i, p in enumerate(engine.parameters()) if p is parameter)


def test_identity_of_a_still_network(ndim: int) -> None:
    batch = pair(ndim)
    engine = made(ndim, {"training_similarity": {"weight": 2}}, stir=0.0)
    with torch.no_grad():
        engine.network.head.weight.zero_()
        assert engine.reverse is not None
        engine.reverse.head.weight.zero_()
        identity = float(engine.losses(batch, "registration")["identity"])
        assert identity == pytest.approx(-0.5 * 2 * float(lncc(batch.moving, batch.moving) + lncc(batch.fixed, batch.fixed)), abs=1e-5)
        assert float(engine.losses(batch, "registration")["cycle"]) == pytest.approx(0, abs=1e-6)
        moved = made(ndim, {"training_similarity": {"name": "mse"}})
        still = made(ndim, {"training_similarity": {"name": "mse"}}, stir=0.0)
        assert float(still.losses(batch, "registration")["identity"]) == pytest.approx(0, abs=1e-7)
        assert float(moved.losses(batch, "registration")["identity"]) > 1e-4
        a, u = batch.moving, moved.network.displacement(batch.moving, batch.moving)
        assert float(moved.losses(batch, "registration")["identity"]) >= -0.5 * float(mse(a, warp_voxels(a, u)))


@pytest.mark.parametrize(
    ("settings", "ab", "ba"),
    [
        ({}, 3, 3),
        ({"engine": {"cycle_weight": 0}}, 2, 2),
        ({"engine": {"identity_weight": 0}}, 2, 2),
        ({"engine": {"cycle_weight": 0, "identity_weight": 0}}, 1, 1),
        ({"engine": {"cycle": "map"}}, 2, 2),
        ({"engine": {"shared": True}}, 6, 0),
    ],
    ids=str,
)
def test_what_is_left_out_is_not_computed(settings: dict[str, Any], ab: int, ba: int) -> None:
    engine, batch = made(2, settings), pair(2)
    counts = {"ab": 0, "ba": 0}
    for name, network in (("ab", engine.network), ("ba", engine.reverse)):
        if network is not None:
            network.register_forward_hook(lambda *_, name=name: counts.update({name: counts[name] + 1}))
    terms = engine.losses(batch, "registration")
    assert counts == {"ab": ab, "ba": ba}
    assert ("cycle" in terms) == ("cycle_weight" not in settings.get("engine", {}))
    assert ("identity" in terms) == ("identity_weight" not in settings.get("engine", {}))
    assert engine.forward_passes_kept >= ab + ba


def test_one_network_is_kept(ndim: int, tmp_path: Path) -> None:
    parameters, engine, batch = engines.read_parameters(None, {"method": "cycle"}), made(ndim), pair(ndim)
    path = tmp_path / "model.safetensors"
    save_model(path, engine, parameters, name="test", training={})
    assert engine.reverse is not None  # the one that goes on learning still has both
    loaded, _ = load_model(path, ndim)
    assert sum(p.numel() for p in loaded.parameters()) * 2 == sum(p.numel() for p in engine.parameters())
    with torch.inference_mode():
        assert torch.equal(loaded.displacement(batch.fixed, batch.moving), engine.displacement(batch.fixed, batch.moving))
    shared = made(ndim, {"engine": {"shared": True}}, stir=0.0)
    shared.load_state_dict(loaded.state_dict())
    again, expected = (e.losses(batch, "registration") for e in (loaded, shared))  # learning goes on with the one network both ways
    assert {n: float(t.detach()) for n, t in again.items()} == {n: float(t.detach()) for n, t in expected.items()}


def test_shared_network_takes_the_images_swapped(ndim: int) -> None:
    engine, batch = made(ndim, {"engine": {"shared": True}}), pair(ndim)
    with torch.no_grad():
        terms, swapped = engine.losses(batch, "registration"), engine.losses(batch.swapped(), "registration")
    assert float(terms["forward_lncc"]) == pytest.approx(float(swapped["backward_lncc"]))
    assert float(terms["cycle"]) == pytest.approx(float(swapped["cycle"]))


def test_map_cycle_of_inverse_maps_is_zero(ndim: int) -> None:
    shift = torch.tensor([1.25, -2.5, 0.75][:ndim]).reshape(1, -1, *[1] * ndim).expand(1, ndim, *(9, 7, 8)[:ndim])
    assert float(map_cycle(shift, -shift, gradient=False)) == pytest.approx(0, abs=1e-12)
    assert float(map_cycle(shift, -shift, gradient=True)) == pytest.approx(0, abs=1e-12)
    length = float((shift / 2).square().sum(dim=1).mean())
    assert float(map_cycle(shift, -shift / 2, gradient=False)) == pytest.approx(length)
    assert float(map_cycle(shift, -shift / 2, gradient=True)) == pytest.approx(0, abs=1e-12)


def test_gradient_of_the_composed_map(ndim: int) -> None:
    shape = (10, 12, 11)[:ndim]
    matrix = torch.from_numpy(np.random.default_rng(1).uniform(-0.05, 0.05, (ndim, ndim)))
    index = torch.from_numpy(np.indices(shape)[::-1].copy()).double()
    u = torch.einsum("ij,j...->i...", matrix, index)[None]
    assert float(map_cycle(torch.zeros_like(u), u, gradient=True)) == pytest.approx(float(matrix.square().sum()), rel=1e-6)


@pytest.mark.parametrize("cycle", ["map", "gradicon"])
def test_every_network_learns_from_themap_cycle(cycle: str, ndim: int) -> None:
    engine, batch = made(ndim, {"engine": {"cycle": cycle}}), pair(ndim)
    assert all(bool(g.any()) for g in gradients(engine, engine.losses(batch, "registration")["cycle"]))


def test_first_weights_of_the_paper(ndim: int) -> None:
    engine = made(ndim, {"engine": {"init": "paper"}}, stir=0.0)
    convs = [m for m in engine.modules() if isinstance(m, SameConv)]
    assert len(convs) == 2 * 11
    assert all(0 < float(c.weight.detach().abs().max()) < 1e-4 for c in convs)
    assert all(0 < float(c.bias.detach().abs().max()) <= c.weight[0].numel() ** -0.5 for c in convs)


def test_the_papers_first_weights_can_learn() -> None:
    """A common shift at first, through the last bias; with biases of zero too nothing would ever move."""
    engine, batch = made(2, {"engine": {"init": "paper", "identity_weight": 0, "cycle_weight": 0}}, stir=0.0), pair(2)
    optimiser, history = torch.optim.Adam(engine.parameters(), lr=1e-2), []
    for _ in range(30):
        optimiser.zero_grad()
        loss = torch.stack(list(engine.losses(batch, "registration").values())).sum()
        loss.backward()
        optimiser.step()
        history.append(float(loss.detach()))
    assert min(history) < history[0] - 0.05


def test_both_ways_are_learned_from_labels_and_masks() -> None:
    batch, engine = pair(2), made(2, {"supervision": {"dice": 1}})
    labels = [(image > 0.5).long() for image in (batch.fixed, batch.moving)]
    mask = F.pad(torch.ones(1, 1, 16, 8), (0, 4))
    with torch.no_grad():
        terms = engine.losses(Batch(batch.fixed, batch.moving, fixed_mask=mask, fixed_labels=labels[0], moving_labels=labels[1]), "registration")
        u = engine.displacement(batch.fixed, batch.moving)
    assert {"forward_dice", "backward_dice"} <= terms.keys()
    assert float(terms["forward_lncc"]) == pytest.approx(-float(lncc(batch.fixed, warp_voxels(batch.moving, u), mask)), abs=1e-6)
    assert float(terms["backward_lncc"]) != pytest.approx(float(terms["forward_lncc"]))
