"""A CUDA device that is only claimed, so that code for a GPU runs, with its values, where there is none.

Every tensor lies on the CPU and is computed there. Which of them claim to lie on `cuda:0` is remembered by their storage: those made with
`device="cuda"`, moved by `.to`, or computed from such. `x.device` tells the claim. As on a real GPU, an operation on tensors of both devices is
refused (a CPU tensor without axes may take part), so is `.numpy()`, and a generator of random numbers has to be of the device. Copies between host
and device and waits for the device are noted, with the function of regtool that caused them.

torch's FakeTensorMode refuses the same (tests/test_gpu_paths.py compares both), but its tensors have no values, so that most of a registration,
which looks at them, cannot run, and their gradients on a GPU end the process where torch is built without CUDA.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

PACKAGE = str(Path(__file__).resolve().parents[1] / "regtool")
CUDA = torch.device("cuda", 0)
Tensor = torch.Tensor
_NESTED = (list, tuple, dict)
_claims: dict[int, StorageWeakRef] = {}  # what outlives a test in a cache of regtool's is still claimed in the next
_real_generator = torch.Generator
_generators: dict[int, torch.Generator] = {}


class Event(NamedTuple):
    """what: to_device, to_host (copies), or wait (the host waits for a number or a count); place: `file.py:function` of regtool."""

    what: str
    bytes: int
    place: str


def on_cuda(x: Tensor) -> bool:
    """Whether it claims to lie on the device."""
    storage = x.untyped_storage()
    found = _claims.get(storage._cdata)
    return found is not None and not found.expired()


def _claim(out: Any, cuda: bool) -> Any:
    for x in _tensors(out):
        if x.device.type == "cpu" and on_cuda(x) != cuda:
            storage = x.untyped_storage()
            if cuda:
                _claims[storage._cdata] = StorageWeakRef(storage)
            else:
                del _claims[storage._cdata]
    return out


def _tensors(value: Any, found: list[Tensor] | None = None) -> list[Tensor]:
    """All in it."""
    found = [] if found is None else found
    if isinstance(value, Tensor):
        found.append(value)
    elif isinstance(value, _NESTED):
        for one in value.values() if isinstance(value, dict) else value:
            _tensors(one, found)
    return found


def _is_cuda(device: Any) -> bool:
    return torch.device(device).type == "cuda"


def _place() -> str:
    """The function of regtool at work."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_qualname.split(".<locals>")[0]
        if frame.f_code.co_filename.startswith(PACKAGE) and not name.endswith(".to"):  # who asks for it
            return f"{frame.f_code.co_filename[len(PACKAGE) + 1 :]}:{name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"


class _Move(torch.autograd.Function):
    """To the other device; the gradient comes back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mode: ClaimedCuda, cuda: bool) -> Tensor:
        ctx.mode, ctx.cuda = mode, cuda
        return mode.copied(x, cuda)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.mode.copied(gradient, not ctx.cuda), None, None


# what may go from one device to the other
COPIES = {torch.ops.aten.copy_.default, torch.ops.aten._foreach_copy_.default}
WAITS = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "is_nonzero", "bincount"}
NO_INTEGERS = {"mm", "bmm", "addmm", "baddbmm", "convolution", "grid_sampler_2d", "grid_sampler_3d", "upsample_bilinear2d", "upsample_trilinear3d"}


class _Dispatch(TorchDispatchMode):
    """Below autograd: every operation, those of gradients too."""

    def __init__(self, mode: ClaimedCuda) -> None:
        super().__init__()
        self.mode = mode

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """To skip torch's compiler is to load it first, which takes seconds; nothing is compiled here."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():  # gradients are computed with both modes on, and the device that is asked for here is the real one
            return self._run(func, args, kwargs or {})

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        inputs = [x for x in _tensors([args, kwargs]) if x.device.type == "cpu"]
        here = [on_cuda(x) for x in inputs]
        name = func._schema.name.split("::")[1]
        cuda = any(here) if inputs else self.mode.context
        if inputs and any(here) and not all(x.dim() == 0 for x, there in zip(inputs, here, strict=True) if not there):
            self._mixed(func, name, args, inputs, here)
            if func in COPIES:
                return func(*args, **kwargs)  # what is written to stays where it is
        if cuda and name in NO_INTEGERS and not inputs[0].is_floating_point():
            raise RuntimeError(f"{name} of whole numbers is not implemented on CUDA")
        if cuda and (name in WAITS or (name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1]))):
            self.mode.note("wait", 0)
        out = func(*args, **kwargs)
        return _claim(out, True) if cuda else out

    def _mixed(self, func: Any, name: str, args: Any, inputs: list[Tensor], here: list[bool]) -> None:
        """Notes what is copied, or refuses."""
        if func in COPIES:
            self.mode.note("to_device" if on_cuda(_tensors(args[0])[0]) else "to_host", sum(x.nbytes for x in _tensors(args[1])))
        else:
            found = ", ".join(f"{tuple(x.shape)} on {'cuda:0' if there else 'cpu'}" for x, there in zip(inputs, here, strict=True))
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found {found}")


class ClaimedCuda(TorchFunctionMode):
    """`with ClaimedCuda() as device:` tensors may lie on device "cuda"; `device.events` has the copies and waits."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.context = False  # whether what a function of torch makes within itself lies on the device
        self.dispatch = _Dispatch(self)
        self.stack = contextlib.ExitStack()

    def copies(self) -> dict[tuple[str, str], tuple[int, int]]:
        """By (direction, place): how many copies, and their bytes."""
        found: dict[tuple[str, str], tuple[int, int]] = collections.defaultdict(lambda: (0, 0))
        for event in self.events:
            count, size = found[event.what, event.place]
            found[event.what, event.place] = count + 1, size + event.bytes
        return dict(found)

    def note(self, what: str, size: int) -> None:
        """One more event."""
        self.events.append(Event(what, size, _place()))

    def copied(self, x: Tensor, cuda: bool) -> Tensor:
        """A copy on the other device."""
        self.note("to_device" if cuda else "to_host", x.nbytes)
        return _claim(x.detach().clone(), cuda)

    def moved(self, x: Tensor, cuda: bool) -> Tensor:
        """Itself where it is there already."""
        if on_cuda(x) == cuda or x.device.type != "cpu":
            return x
        return _Move.apply(x, self, cuda) if x.requires_grad and torch.is_grad_enabled() else self.copied(x, cuda)

    def __enter__(self) -> ClaimedCuda:
        engine = torch.autograd.graph._engine_run_backward

        def run_backward(outputs: Any, *args: Any, **kwargs: Any) -> Any:
            """Gradients written in Python are ours too, and torch runs them with its modes switched off."""
            before, self.context = self.context, any(on_cuda(x) for x in _tensors(outputs))
            try:
                with _FunctionModeOn(self):
                    return engine(outputs, *args, **kwargs)
            finally:
                self.context = before

        for module, name, value in (
            (torch.autograd.graph, "_engine_run_backward", run_backward),
            (torch.autograd, "_engine_run_backward", run_backward),
            (torch._tensor, "_engine_run_backward", run_backward),
            (torch, "Generator", _Generator),
        ):
            if hasattr(module, name):
                self.stack.callback(functools.partial(setattr, module, name, getattr(module, name)))
                setattr(module, name, value)
        self.stack.enter_context(self.dispatch)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.stack.close()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if special := _SPECIAL.get(func):
            return special(self, *args, **kwargs)
        if func.__name__ == "__get__":  # shape, dtype and the like
            return func(*args)
        device, before = kwargs.get("device"), self.context
        inputs = _tensors([args, kwargs])
        wanted = any(on_cuda(x) for x in inputs if x.device.type == "cpu") if device is None else _is_cuda(device)
        if device is not None and wanted:
            kwargs["device"] = "cpu"
        if (random := kwargs.get("generator")) is not None and (id(random) in _generators) != wanted:
            raise RuntimeError(f"expected a generator on {'cuda' if wanted else 'cpu'}")
        self.context = wanted
        try:
            out = func(*args, **kwargs)
        finally:
            self.context = before
        if device is None or torch.device(device).type == "meta":
            return out
        if wanted and func is torch.tensor:
            self.note("to_device", out.nbytes)
        return _claim(out, wanted)


class _Generator:
    """What makes a `torch.Generator` of either device."""

    def __new__(cls, device: Any = "cpu") -> torch.Generator:  # type: ignore[misc]
        out = _real_generator("cpu")
        if _is_cuda(device):
            _generators[id(out)] = out
        return out


class _FunctionModeOn:
    """The mode, without its __enter__."""

    def __init__(self, mode: ClaimedCuda) -> None:
        self.mode = mode

    def __enter__(self) -> None:
        TorchFunctionMode.__enter__(self.mode)

    def __exit__(self, *error: Any) -> None:
        TorchFunctionMode.__exit__(self.mode, *error)


def _device(mode: ClaimedCuda, x: Tensor) -> torch.device:
    real = Tensor.device.__get__(x)  # type: ignore[attr-defined]
    return CUDA if real.type == "cpu" and on_cuda(x) else real


def _to(mode: ClaimedCuda, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    values = [*args, *kwargs.values()]  # a device, a dtype or both, or a tensor that has them; whether to wait or to copy in any case is all one here
    wanted: bool | None = None
    for value in values:
        if isinstance(value, Tensor):
            wanted, x = on_cuda(value), x.to(value.dtype)
        elif isinstance(value, torch.dtype):
            x = x.to(value)
        elif isinstance(value, str | torch.device):
            if torch.device(value).type == "meta":
                return x.to(value)
            wanted = _is_cuda(value)
        elif isinstance(value, torch.memory_format):
            x = x.to(memory_format=value)
    return x if wanted is None else mode.moved(x, wanted)


def _as_tensor(mode: ClaimedCuda, data: Any, dtype: Any = None, device: Any = None) -> Tensor:
    if isinstance(data, Tensor):
        return _to(mode, data, device if device is not None else Tensor.device.__get__(data) if not on_cuda(data) else CUDA, dtype)  # type: ignore[attr-defined]
    out = torch.as_tensor(data, dtype=dtype)
    return out if device is None else mode.moved(out, _is_cuda(device))


def _numpy(mode: ClaimedCuda, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    if on_cuda(x):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first.")
    return x.numpy(*args, **kwargs)


def _array(mode: ClaimedCuda, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    return _numpy(mode, x).__array__(*args, **kwargs)


def _tolist(mode: ClaimedCuda, x: Tensor) -> Any:
    if on_cuda(x):
        mode.note("wait", x.nbytes)
    return x.tolist()


def _new_tensor(mode: ClaimedCuda, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return mode.moved(x.new_tensor(*args, **kwargs), on_cuda(x))


def _deepcopy(mode: ClaimedCuda, x: Tensor, memo: Any) -> Tensor:
    return _claim(Tensor.__deepcopy__(x, memo), on_cuda(x))


_SPECIAL: dict[Any, Callable[..., Any]] = {
    Tensor.device.__get__: _device,  # type: ignore[attr-defined]
    Tensor.is_cuda.__get__: lambda _, x: on_cuda(x),  # type: ignore[attr-defined]
    Tensor.is_cpu.__get__: lambda mode, x: _device(mode, x).type == "cpu",  # type: ignore[attr-defined]
    Tensor.to: _to,
    Tensor.cpu: lambda mode, x, **_: mode.moved(x, False),
    Tensor.cuda: lambda mode, x, *_, **__: mode.moved(x, True),
    torch.as_tensor: _as_tensor,
    Tensor.numpy: _numpy,
    Tensor.__array__: _array,
    Tensor.tolist: _tolist,
    Tensor.new_tensor: _new_tensor,
    Tensor.__deepcopy__: _deepcopy,
}
