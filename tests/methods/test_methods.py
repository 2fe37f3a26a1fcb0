"""What every method must do, whatever it is: the contract of methods/base.py."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from regtool import methods as engines
from regtool.config import choices
from regtool.config.schema import Parameters
from regtool.config.toml import merged
from regtool.deformation.velocity import velocity
from regtool.errors import ModelError, ParameterError, UsageError
from regtool.geometry.sampling import warp_voxels
from regtool.io.models import read_tensors, write_model
from regtool.methods.base import Engine
from regtool.methods.model_file import load_model, save_model
from regtool.preprocessing.batch import Batch
from regtool.similarity.lncc import lncc
from tests.conftest import blobs

SMALL = {"deformgan": {"engine": {"channels": [8, 16, 32]}}}  # of millions of weights, fewer
METHODS = [(name, engines.read_parameters(None, merged({"method": name}, SMALL.get(name, {})))) for name in engines.names()]
METHODS.append(("voxelmorph, velocity", engines.read_parameters(None, {"method": "voxelmorph", "engine": {"integration_steps": 5}})))


@pytest.fixture(params=METHODS, ids=[m[0] for m in METHODS])
def parameters(request: pytest.FixtureRequest) -> Parameters:
    return request.param[1]


def made(parameters: Parameters, ndim: int, seed: int = 0) -> Engine:
    torch.manual_seed(seed)
    return engines.build(parameters, ndim)


def pair(ndim: int, size: int = 32) -> Batch:
    shape = (size,) * ndim
    middle = size / 2 - 0.5
    fixed, moving = (torch.from_numpy(blobs(shape, (middle + shift,) + (middle,) * (ndim - 1), size / 4))[None, None] for shift in (1.0, -1.0))
    return Batch(fixed, moving)


@pytest.mark.parametrize("size", [(32, 32, 32), (1, 17, 23), (5, 16, 40)], ids=str)
def test_displacement_has_the_images_shape(parameters: Parameters, ndim: int, size: tuple[int, ...]) -> None:
    shape = size[:ndim]
    fixed, moving = torch.rand(2, 1, *shape), torch.rand(2, 1, *shape)
    with torch.inference_mode():
        u = made(parameters, ndim).eval().displacement(fixed, moving)
    assert u.shape == (2, ndim, *shape)
    assert u.dtype == torch.float32
    assert bool(torch.isfinite(u).all())


def test_an_untrained_engine_hardly_moves_anything(parameters: Parameters, ndim: int) -> None:
    batch = pair(ndim)
    with torch.inference_mode():
        assert float(made(parameters, ndim).eval().displacement(batch.fixed, batch.moving).abs().max()) < 0.5


def test_every_phase_reaches_every_parameter_it_trains(parameters: Parameters, ndim: int) -> None:
    engine, batch = made(parameters, ndim).train(), pair(ndim)
    for phase in engine.phases:
        wanted = list(engine.trainable(phase))
        assert wanted
        engine.zero_grad()
        terms = engine.losses(batch, phase)
        assert all(t.dim() == 0 for t in terms.values())
        torch.stack(list(terms.values())).sum().backward()
        for p in wanted:
            assert p.grad is not None
            assert bool(torch.isfinite(p.grad).all())


def test_thirty_steps_lower_the_loss(parameters: Parameters, ndim: int) -> None:
    engine, batch = made(parameters, ndim).train(), pair(ndim, {2: 32, 3: 16}[ndim])
    optimisers = {phase: torch.optim.Adam(engine.trainable(phase), lr=1e-3) for phase in engine.phases}
    history = []
    for _ in range(30):
        for phase in engine.phases:
            engine.zero_grad()
            loss = torch.stack(list(engine.losses(batch, phase).values())).sum()
            loss.backward()
            optimisers[phase].step()
        history.append(float(loss.detach()))
    assert min(history[-5:]) < history[0] - 0.01, history


def test_a_saved_engine_predicts_the_same(parameters: Parameters, ndim: int, tmp_path: Path) -> None:
    engine, batch = made(parameters, ndim).eval(), pair(ndim)
    with torch.no_grad():
        for p in engine.parameters():
            p.add_(0.01 * torch.randn_like(p))
    path = tmp_path / "model.safetensors"
    card = save_model(path, engine, parameters, name="test", training={"steps": 0})
    loaded, read = load_model(path, ndim)
    assert read == card
    assert read["dimension"] == ndim
    assert read["citation"] == engines.citation_of(str(parameters.method))
    with torch.inference_mode():
        assert torch.equal(loaded.displacement(batch.fixed, batch.moving), engine.displacement(batch.fixed, batch.moving))
    with pytest.raises(ModelError, match=f"made for {ndim}-D images"):
        load_model(path, 5 - ndim)


def test_runs_on_the_meta_device(parameters: Parameters, ndim: int) -> None:
    engine = made(parameters, ndim).to("meta")
    image = torch.empty(1, 1, *(20, 33, 16)[:ndim], device="meta")
    assert engine.displacement(image, image).shape == (1, ndim, *image.shape[2:])


@pytest.mark.gpu
def test_cuda_agrees_with_the_cpu(parameters: Parameters, ndim: int) -> None:
    engine, batch = made(parameters, ndim).eval(), pair(ndim, 48)
    with torch.no_grad():
        for p in engine.parameters():
            p.add_(0.01 * torch.randn_like(p))
    allowed, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        with torch.inference_mode():
            here = engine.displacement(batch.fixed, batch.moving)
            there = engine.cuda().displacement(batch.fixed.cuda(), batch.moving.cuda()).cpu()
    finally:
        torch.backends.cudnn.allow_tf32 = allowed
    assert float((here - there).abs().max()) < 1e-3


@pytest.mark.parametrize("name", engines.names())
def test_parameters_without_torch_are_the_real_ones(name: str) -> None:
    module = sys.modules[engines.load(name).__module__]
    assert engines.parameters_of(name).model_json_schema() == module.Parameters.model_json_schema()
    assert engines.parameters_of(name)().model_dump() == module.Parameters().model_dump()
    assert len(engines.summary(name)) > 20


@pytest.mark.parametrize("name", engines.names())
def test_every_method_says_what_to_cite(name: str) -> None:
    """Authors, title, venue and year; our own has no paper."""
    assert re.fullmatch(r"\w.+? [A-Z]{1,2}\. .+\. .*20\d\d\.", engines.citation_of(name)) or "described in no paper" in engines.citation_of(name)


def test_listing_methods_imports_no_torch() -> None:
    code = "import sys; from regtool import methods as e; [(e.summary(n), e.parameters_of(n)()) for n in e.names()]; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


def test_a_new_method_is_one_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = (Path(engines.__file__).parent / "voxelmorph.py").read_text(encoding="utf-8").replace('"""VoxelMorph: a', '"""Mine: a', 1)
    (tmp_path / "zzz_mine.py").write_text(text, encoding="utf-8")
    monkeypatch.setitem(choices.FOLDERS, "method", [tmp_path])
    monkeypatch.setattr(engines, "__path__", [str(tmp_path), *engines.__path__])
    assert engines.names() == ["zzz_mine"]
    assert engines.summary("zzz_mine").startswith("Mine: a")
    assert engines.build(Parameters(method="zzz_mine", engine={"variant": "vm1"}), 2).displacement(*torch.rand(2, 1, 1, 8, 8)).shape == (1, 2, 8, 8)


def test_unknown_names_and_parameters_are_explained() -> None:
    with pytest.raises(UsageError, match="did you mean 'voxelmorph'"):
        engines.load("voxelmorf")
    with pytest.raises(UsageError, match="unknown method '_engine'"):
        engines.build(Parameters(method="_engine"), 2)
    with pytest.raises(ParameterError, match=r"engine\.varient: unknown parameter; did you mean 'variant'"):
        engines.build(Parameters(method="voxelmorph", engine={"varient": "vm1"}), 2)


def test_weights_of_another_variant_are_refused(tmp_path: Path) -> None:
    parameters = Parameters(method="voxelmorph", engine={"variant": "vm1"})
    path = tmp_path / "m.safetensors"
    card = save_model(path, made(parameters, 2), parameters, name="m", training={})
    tensors = read_tensors(path)
    wrong = {**card, "parameters": {**card["parameters"], "engine": {"variant": "vm2"}}}
    write_model(path, tensors, wrong)
    with pytest.raises(ModelError, match="have shape"):
        load_model(path)
    write_model(path, {k: v for k, v in tensors.items() if k != "network.head.bias"}, card)
    with pytest.raises(ModelError, match=r"network\.head\.bias are missing"):
        load_model(path)
    write_model(path, {**tensors, "extra": torch.zeros(1)}, card)
    with pytest.raises(ModelError, match="extra are not part"):
        load_model(path)
    write_model(path, tensors, {**card, "method": "nonesuch"})
    with pytest.raises(ModelError, match="lacks"):
        load_model(path)
    write_model(path, tensors, {**card, "parameters": {"engine": {}, "colour": 1}})
    with pytest.raises(ModelError, match="not those of this regtool"):
        load_model(path)


def test_masked_similarity(ndim: int) -> None:
    engine, batch = made(Parameters(method="voxelmorph"), ndim), pair(ndim)
    mask = torch.zeros_like(batch.fixed)
    mask[..., : mask.shape[-1] // 2] = 1
    terms = engine.losses(Batch(batch.fixed, batch.moving, fixed_mask=mask), "registration")
    u = engine.displacement(batch.fixed, batch.moving)
    assert float(terms["lncc"].detach()) == pytest.approx(-float(lncc(batch.fixed, warp_voxels(batch.moving, u), mask).detach()), abs=1e-6)


def test_velocity_of_a_shift_is_the_shift_in_fine_voxels(ndim: int) -> None:
    coarse, shape = (8, 10, 12)[-ndim:], (16, 30, 24)[-ndim:]
    v = torch.ones(1, ndim, *coarse) * torch.arange(1, ndim + 1).reshape(1, -1, *[1] * ndim)
    u = velocity(v, shape)
    ratio = torch.tensor([n / m for n, m in zip(shape, coarse, strict=True)][::-1])
    assert torch.allclose(u, (torch.arange(1, ndim + 1) * ratio).reshape(1, -1, *[1] * ndim).expand_as(u), atol=1e-4)
