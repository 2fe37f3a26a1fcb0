"""Deform-GAN: three networks of the published sizes, trained in turn without touching one another."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from regtool import methods as engines
from regtool.config.toml import merged
from regtool.geometry.sampling import warp_voxels
from regtool.methods import load
from regtool.methods.adversary import PATIENCE, Monitor
from regtool.methods.base import Engine
from regtool.networks.blocks import CONV, CONVOLVE, MAX_POOL, EvenDoublingConv
from regtool.networks.discriminator import Discriminator
from regtool.networks.plain_unet import PlainUNet
from regtool.preprocessing.batch import Batch
from regtool.similarity.adversarial import absolute_error, discriminator_loss, generator_loss
from regtool.similarity.lncc import lncc
from tests.conftest import blobs

DeformGAN = load("deformgan")

FILES = [f for f in sorted((Path(__file__).resolve().parents[2] / "parameter_files").glob("deformgan_*.toml")) if "_synthetic_" not in f.stem]
SMALL = {"engine": {"channels": [4, 8, 8]}}


def made(ndim: int, *settings: dict[str, Any], seed: int = 0) -> DeformGAN:
    torch.manual_seed(seed)
    engine = engines.build(engines.read_parameters(None, merged({"method": "deformgan"}, SMALL, *settings)), ndim)
    assert isinstance(engine, DeformGAN)
    return engine.train()


def pair(ndim: int, size: int = 16, n: int = 2) -> Batch:
    """The moving image has the other contrast."""
    shape, middle = (size,) * ndim, size / 2 - 0.5
    fixed, moving = (torch.from_numpy(blobs(shape, (middle + s,) + (middle,) * (ndim - 1), size / 4))[None, None] / 1.5 for s in (1.0, -1.0))
    return Batch(fixed.repeat(n, *[1] * (ndim + 1)), (1 - moving).repeat(n, *[1] * (ndim + 1)))


def total(terms: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(terms.values())).sum()


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def state(engine: Engine) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in engine.state_dict().items()}


def changed(engine: Engine, before: dict[str, torch.Tensor]) -> set[str]:
    return {k.removeprefix("adversary.").split(".")[0] for k, v in engine.state_dict().items() if not torch.equal(v, before[k])}


def test_sizes_are_the_released_ones() -> None:
    engine = engines.build(engines.read_parameters(None, {"method": "deformgan"}), 3)
    assert isinstance(engine, DeformGAN) and engine.adversary is not None
    assert count(engine.network) == 5_646_627  # T 5.65 M
    assert count(engine.adversary.generator) == 5_644_913  # G 5.64 M
    assert count(engine.adversary.discriminator) == 2_933_953  # D 2.93 M
    assert [count(torch.nn.ModuleList([torch.nn.ParameterList(engine.trainable(p))])) for p in engine.phases] == [2_933_953, 5_644_913, 5_646_627]


def even_doubling(x: torch.Tensor, layer: EvenDoublingConv) -> torch.Tensor:
    """As Keras would: repeat every voxel, pad one zero at each far end, convolve with the kernel of 2."""
    for axis in range(2, x.dim()):
        x = x.repeat_interleave(2, dim=axis)
    return CONVOLVE[x.dim() - 2](F.pad(x, [0, 1] * (x.dim() - 2)), layer.weight, layer.bias)


def test_even_doubling_is_repetition_then_convolution(ndim: int) -> None:
    layer = EvenDoublingConv(ndim, 5, 4).double()
    torch.nn.init.normal_(layer.bias)
    x = torch.rand(2, 5, *(3, 1, 4)[:ndim], dtype=torch.float64)
    assert torch.allclose(layer(x), even_doubling(x, layer), atol=1e-12)


def test_plain_unet_layer_by_layer(ndim: int) -> None:
    net = PlainUNet(ndim, 2, (3, 4, 5), CONV[ndim](3, 1, 1)).double()
    x = torch.randn(2, 2, *(8, 4, 12)[:ndim], dtype=torch.float64)
    conv = CONVOLVE[ndim]

    def two(x: torch.Tensor, p: torch.nn.Module) -> torch.Tensor:
        x = conv(x, p.first.weight, p.first.bias, padding=1).relu()
        return conv(x, p.second.weight, p.second.bias, padding=1).relu()

    fine = two(x, net.down[0])
    middle = two(MAX_POOL[ndim](fine, 2), net.down[1])
    coarse = two(MAX_POOL[ndim](middle, 2), net.down[2])
    up = two(torch.cat([middle, even_doubling(coarse, net.doubling[0]).relu()], dim=1), net.up[0])
    up = two(torch.cat([fine, even_doubling(up, net.doubling[1]).relu()], dim=1), net.up[1])
    assert net.multiple == 4
    assert torch.allclose(net(x), conv(up, net.head.weight, net.head.bias), atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"engine": {"spectral_norm": True}}, {"engine": {"variant": 1}, "train": {"batch_size": 1}}], ids=str)
def test_each_phase_changes_only_its_own_network(ndim: int, options: dict[str, Any]) -> None:
    engine, batch = made(ndim, options), pair(ndim, n=1)
    for phase, own in (("discriminator", {"discriminator", "monitor"}), ("generator", {"generator"}), ("registration", {"network", "monitor"})):
        before = state(engine)
        engine.zero_grad(set_to_none=True)
        total(engine.losses(batch, phase)).backward()
        trained = {id(p) for p in engine.trainable(phase)}
        assert all((p.grad is not None) == (id(p) in trained) for p in engine.parameters())
        torch.optim.Adam(engine.trainable(phase), lr=1e-2).step()
        assert changed(engine, before) == own
    assert all(p.requires_grad for p in engine.parameters())


def test_the_gradient_of_t_passes_through_g(ndim: int) -> None:
    engine = made(ndim).double().eval()
    rng = torch.Generator().manual_seed(1)
    fixed, moving = torch.rand(2, 1, 1, *(8, 12, 8)[:ndim], dtype=torch.float64, generator=rng)
    batch, bias = Batch(fixed, moving), engine.network.head.bias
    with torch.no_grad():
        bias.fill_(0.3)

    def term() -> torch.Tensor:
        return engine.losses(batch, "registration")["lncc_translated"]

    term().backward()
    numeric = torch.zeros_like(bias)
    with torch.no_grad():
        for k in range(ndim):
            values = []
            for step in (1e-6, -2e-6):
                bias[k] += step
                values.append(term())
            bias[k] += 1e-6
            numeric[k] = (values[0] - values[1]) / 2e-6
    assert float(numeric.abs().max()) > 1e-3
    assert bias.grad is not None and torch.allclose(bias.grad, numeric, rtol=1e-3, atol=1e-6)


def test_only_variant_2_constrains_the_gradients_of_g(ndim: int) -> None:
    terms = {v: made(ndim, {"engine": {"variant": v}}).losses(pair(ndim), "generator") for v in (1, 2)}
    assert set(terms[2]) - set(terms[1]) == {"local_gradients"}
    assert all(torch.equal(terms[1][name], terms[2][name]) for name in terms[1])
    assert -5 <= float(terms[2]["local_gradients"].detach()) < 0
    half = made(ndim, {"engine": {"mu": 2.5}}).losses(pair(ndim), "generator")["local_gradients"]
    assert float(half.detach()) == pytest.approx(float(terms[2]["local_gradients"].detach()) / 2, rel=1e-5)


def test_terms_are_those_of_the_paper(ndim: int) -> None:
    engine, batch = made(ndim, {"preprocess": {"top": 2.0}}), pair(ndim)
    assert engine.adversary is not None
    fixed, warped = batch.fixed - 1, warp_voxels(batch.moving, engine.displacement(batch.fixed, batch.moving)).detach() - 1
    with torch.no_grad():
        fake = torch.tanh(engine.adversary.generator(warped))
        real_logits, fake_logits = engine.adversary.discriminator(torch.cat([fixed, fake])).chunk(2)
        kernels = {m: 1e-4 * sum(float((p**2).sum()) for n, p in m.named_parameters() if n.endswith("weight")) for m in _unets(engine)}
        found = {phase: {k: float(v) for k, v in engine.losses(batch, phase).items()} for phase in engine.phases}
    probability = torch.cat([real_logits.sigmoid(), 1 - fake_logits.sigmoid()])
    assert found["discriminator"] == pytest.approx({"adversarial": float(-probability.log().mean())}, rel=1e-4)
    assert found["generator"]["adversarial"] == pytest.approx(float(-fake_logits.sigmoid().log().mean()), rel=1e-4)
    assert found["generator"]["l1"] == pytest.approx(100 * float((fake - fixed).abs().mean()), rel=1e-4)
    assert found["generator"]["weight_decay"] == pytest.approx(kernels[engine.adversary.generator], rel=1e-4)
    assert set(found["registration"]) == {"lncc_translated", "local_gradients", "weight_decay", "diffusion"}
    assert found["registration"]["lncc_translated"] == pytest.approx(-float(lncc(fixed, fake, window=7)), abs=1e-5)
    assert found["registration"]["weight_decay"] == pytest.approx(kernels[engine.network], rel=1e-4)
    assert -2 <= found["registration"]["local_gradients"] < 0


def _unets(engine: DeformGAN) -> list[PlainUNet]:
    assert engine.adversary is not None
    return [engine.network, engine.adversary.generator]


def test_a_mask_counts_for_g_too(ndim: int) -> None:
    a, b, mask = torch.rand(3, 2, 1, *(4, 5, 6)[:ndim])
    mask = (mask > 0.5).float()
    assert float(absolute_error(a, b, mask)) == pytest.approx(float((a - b)[mask > 0].abs().mean()), rel=1e-5)
    assert float(absolute_error(a, b)) == pytest.approx(float((a - b).abs().mean()), rel=1e-5)


def test_warm_up(ndim: int) -> None:
    engine, batch = made(ndim, {"engine": {"warmup_steps": 4}}), pair(ndim)
    optimisers = {phase: torch.optim.Adam(engine.trainable(phase), lr=1e-3) for phase in engine.phases}
    names: list[list[str]] = []
    moved, translated = [], []
    for _ in range(6):
        before = state(engine)
        for phase in engine.phases:
            engine.zero_grad()
            terms = engine.losses(batch, phase)
            names.append(list(terms))
            total(terms).backward()
            optimisers[phase].step()
        moved.append(changed(engine, before) - {"monitor"})
        translated.append(float(terms["lncc_translated"].detach()))
    assert names == names[:3] * 6
    assert moved == [{"network"}] * 2 + [{"network", "generator", "discriminator"}] * 4
    assert [t != 0 for t in translated] == [False] * 4 + [True] * 2


def test_label_smoothing_by_hand() -> None:
    real, fake = torch.tensor([math.log(3.0)]), torch.tensor([math.log(0.25)])  # probabilities 3/4 and 1/5
    assert float(discriminator_loss(real, fake)) == pytest.approx(-(math.log(0.75) + math.log(0.8)) / 2)
    assert float(discriminator_loss(real, fake, 0.1)) == pytest.approx(-(0.9 * math.log(0.75) + 0.1 * math.log(0.25) + math.log(0.8)) / 2)
    assert float(generator_loss(fake)) == pytest.approx(-math.log(0.2))
    at_rest = math.log(0.9 / 0.1)  # where a smoothed real image pulls no further
    assert float(discriminator_loss(torch.tensor([at_rest]), fake, 0.1)) < float(discriminator_loss(torch.tensor([at_rest + 1]), fake, 0.1))


def test_spectral_norm_bounds_every_layer(ndim: int) -> None:
    torch.manual_seed(0)
    net = Discriminator(ndim, 1, (4, 8, 8), spectral=True).train()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(10)
        for _ in range(50):
            net(torch.rand(2, 1, *[16] * ndim))
    for layer in (*net.convs, net.score):
        assert float(torch.linalg.matrix_norm(layer.weight.detach().flatten(1), ord=2)) == pytest.approx(1, abs=0.02)
    assert not any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in net.modules())
    assert any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in Discriminator(ndim, 1, (4, 8, 8)).modules())


@pytest.mark.parametrize("spectral", [False, True])
def test_discriminator_takes_any_shape(ndim: int, spectral: bool) -> None:
    net = Discriminator(ndim, 2, (4, 8, 8), spectral=spectral)
    for shape in ((16, 16, 16), (1, 17, 5), (1, 1, 1)):
        assert net(torch.rand(2, 2, *shape[:ndim])).shape == (2,)


def test_the_monitor_warns_of_a_degenerate_contest_only() -> None:
    torch.manual_seed(0)
    real = torch.rand(2, 1, 8, 8)
    right, wrong = torch.tensor([3.0, 3.0]), torch.tensor([-3.0, 3.0])
    healthy, beaten, constant = Monitor(), Monitor(), Monitor()
    for step in range(PATIENCE + 300):
        healthy.see(right if step % 3 else wrong, -right if step % 2 else wrong, real, real.flip(-1))
        beaten.see(right, -right, real, real.flip(-1))
        constant.see(right, wrong, real, torch.full_like(real, 0.2) + 0.01 * real)
        if step == PATIENCE // 2:
            assert beaten.warning() is None and constant.warning() is None
    assert healthy.warning() is None
    assert "label_smoothing" in str(beaten.warning())
    assert "collapsed" in str(constant.warning())
    for step in range(100):  # D's luck changes
        beaten.see(wrong, wrong if step % 2 else -right, real, real)
    assert beaten.warning() is None


def test_what_the_monitor_knows_is_saved(ndim: int) -> None:
    engine, batch = made(ndim), pair(ndim)
    for phase in engine.phases:
        engine.losses(batch, phase)
    seen = state(engine)
    assert int(seen["adversary.monitor.steps"]) == 1
    assert float(seen["adversary.monitor.accuracy"]) != 0.5 or float(seen["adversary.monitor.contrast"]) != 1
    with torch.no_grad():
        engine.adversary.monitor.sure_for.fill_(PATIENCE)
    other = made(ndim, seed=1)
    assert other.warning() is None
    other.load_state_dict(state(engine))
    assert other.warning() == engine.warning() != None  # noqa: E711
    engine.eval()
    before = state(engine)
    for phase in engine.phases:
        engine.losses(batch, phase)
    assert not changed(engine, before)


def test_t_alone_is_left_and_still_learns(ndim: int) -> None:
    engine, batch = made(ndim), pair(ndim)
    u = engine.displacement(batch.fixed, batch.moving)
    engine.drop_training_parts()
    assert {k.split(".")[0] for k in engine.state_dict()} == {"network"}
    assert torch.equal(engine.displacement(batch.fixed, batch.moving), u)
    assert engine.phases == ("registration",) and DeformGAN.phases[0] == "discriminator"
    assert set(engine.losses(batch, "registration")) == {"local_gradients", "weight_decay", "diffusion"}
    assert len(list(engine.trainable("registration"))) == len(list(engine.network.parameters()))
    assert engine.warning() is None


def test_the_same_seed_gives_the_same_training(ndim: int) -> None:
    def run() -> list[float]:
        engine, batch, out = made(ndim, {"engine": {"spectral_norm": True}}), pair(ndim), []
        optimisers = {phase: torch.optim.Adam(engine.trainable(phase), lr=1e-3) for phase in engine.phases}
        for _ in range(3):
            for phase in engine.phases:
                engine.zero_grad()
                loss = total(engine.losses(batch, phase))
                loss.backward()
                optimisers[phase].step()
                out.append(float(loss.detach()))
        return out

    assert run() == run()


def test_bfloat16_keeps_the_displacement_in_float32(ndim: int) -> None:
    engine, batch = made(ndim), pair(ndim)
    exact = engine.displacement(batch.fixed, batch.moving)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        u = engine.displacement(batch.fixed, batch.moving)
        losses = [v for phase in engine.phases for v in engine.losses(batch, phase).values()]
    assert u.dtype == torch.float32
    assert float((u - exact).detach().abs().max()) < 0.1 * float(exact.detach().abs().max())
    assert all(v.dtype == torch.float32 and bool(torch.isfinite(v.detach())) for v in losses)


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_shipped_parameter_files(file: Path) -> None:
    parameters = engines.read_parameters(file)
    assert file.read_text(encoding="utf-8").startswith(f"# regtool train PAIRS.csv -p parameter_files/{file.name} -o RUN\n")
    assert engines.engine_section(parameters, file) is not None
    engine = engines.build(parameters, 2 if "2d" in file.stem else 3)
    assert isinstance(engine, DeformGAN)


def test_three_files_are_shipped() -> None:
    assert [f.stem for f in FILES] == ["deformgan_brain_mri_3d", "deformgan_cardiac_mri_2d", "deformgan_hippocampus_mri_3d"]
