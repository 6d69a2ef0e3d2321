"""A GPU that is not there: tensors that say they are on it, and are computed on the CPU.

Within `FakeGpu()`, tensors of device "cuda" hold ordinary ones. Their values are those of the CPU
to the bit, those of random draws and gradients too, so that results can be compared. They keep the
rules of a GPU:

- an operation on tensors of two devices is an error, but for copies, indices, and tensors of no
  dimension on the CPU in elementwise operations; so is a generator of another device;
- `FakeGpu.waits` names what makes the host wait for the device: values and sizes that it reads, and
  copies from one to the other, unless they are asynchronous and the host's side is pinned.

What the kernels of a GPU do, on which types, in which precision and how fast, is not seen here, nor
what other threads do.
"""

import contextlib
from unittest import mock

import torch
from host_reads import waits_for_device
from torch.overrides import TorchFunctionMode

DEVICE = torch.device("cuda", 0)
_CPU = torch.device("cpu")
_COPIES = ("copy_", "_foreach_copy_")
_INDEXED = ("index", "index_put", "index_put_")
_MOVES = {torch.Tensor.to: None, torch.Tensor.cuda: DEVICE, torch.Tensor.cpu: _CPU}
_FROM_DATA = (torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor)
_READS_ON_THE_CPU_ALONE = (torch.nn.functional.one_hot,)  # to check its argument
_PLACED = {*_MOVES, *_FROM_DATA, *_READS_ON_THE_CPU_ALONE, torch.Tensor.pin_memory,
           torch.Tensor.__setitem__}
_NOTHING = contextlib.nullcontext()

_waits: list[str] = []


class FakeGpuTensor(torch.Tensor):
    """A tensor on the device; `held` is the one that has its values."""

    held: torch.Tensor
    device = DEVICE
    is_cuda, is_cpu = True, False
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor):
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else _NOTHING:
            return torch.Tensor._make_wrapper_subclass(
                cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(),
                dtype=held.dtype, requires_grad=held.requires_grad)

    def __init__(self, held: torch.Tensor):
        self.held = held.detach()

    def __repr__(self, **kwargs):
        return f"FakeGpuTensor({self.held})"

    def __reduce_ex__(self, protocol):
        return self.held.__reduce_ex__(protocol)  # files hold the values alone

    def tolist(self):
        _waits.append("tolist")
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if torch.is_inference_mode_enabled():  # which leaves it to us what an operation consists of
            parts = func.decompose(*args, **(kwargs or {}))
            if parts is not NotImplemented:
                return parts
        given: dict[int, torch.Tensor] = {}  # by what holds their values

        def held(x: torch.Tensor) -> torch.Tensor:
            given[id(_held(x))] = x
            return _held(x)

        kwargs = kwargs or {}
        held_args = _mapped(held, args)
        held_kwargs = {name: _mapped(held, x) for name, x in kwargs.items()}
        name = func.overloadpacket.__name__
        if name in _COPIES:
            _note_copies(args, kwargs)
        elif name in _INDEXED:
            _check_indices(func, args)
        else:
            _check_devices(func, given.values(), args)
        if waits_for_device(func, args):
            _waits.append(name)
        # What is changed in place is given back as the tensor that it was.
        return _mapped(lambda x: given[id(x)] if id(x) in given else FakeGpuTensor(x),
                       func(*held_args, **held_kwargs))


class FakeGpuGenerator(torch.Generator):
    """What `torch.Generator` is within `FakeGpu`: draws on the CPU, and says where it was asked."""

    def __new__(cls, device="cpu"):
        self = super().__new__(cls)
        self._device = _place(device)
        return self

    def __init__(self, device="cpu"):
        pass

    @property
    def device(self) -> torch.device:
        return self._device


class _Placing(TorchFunctionMode):
    """Makes and moves tensors as the device is that they are asked for."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if not kwargs and func not in _PLACED:
            return func(*args)
        kwargs = dict(kwargs or {})
        is_pinned = kwargs.pop("pin_memory", False)
        if func is torch.Tensor.pin_memory:
            return _pinned(args[0].clone())
        if func in _MOVES:
            return _moved(args, {"device": _MOVES[func], **kwargs})
        if func is torch.as_tensor and isinstance(args[0], torch.Tensor):
            return _moved(args, kwargs)
        if func in _READS_ON_THE_CPU_ALONE:
            return _beside(args[0], func(_held(args[0]), *args[1:], **kwargs))
        if func is torch.Tensor.__setitem__ and isinstance(args[2], int | float):
            target, index, number = args
            args = (target, index, _beside(target, torch.tensor(number, dtype=target.dtype)))
        device = kwargs.pop("device", None)
        if device is not None:
            device = _place(device)
            kwargs["device"] = _CPU if device == DEVICE else device
        _check_generator(kwargs.get("generator"), device, args)
        result = func(*args, **kwargs)
        if device == _CPU:
            result = _held(result)
        elif device == DEVICE and not isinstance(result, FakeGpuTensor):
            if func in _FROM_DATA:
                _waits.append("copy to the device")
            result = FakeGpuTensor(result)
        return _pinned(result) if is_pinned else result


class _Event:
    """A `torch.cuda.Event` of a device that is never behind."""

    def record(self) -> None:
        pass

    def query(self) -> bool:
        return True


class FakeGpu(contextlib.ExitStack):
    """While it is entered, there is a device "cuda" for this thread.

    Attributes:
        waits: what has made the host wait for it so far; may be cleared.
    """

    waits = _waits

    def __enter__(self):
        super().__enter__()
        # A moved parameter is a new one: the old can't change its class.
        self.callback(torch.__future__.set_overwrite_module_params_on_conversion,
                      torch.__future__.get_overwrite_module_params_on_conversion())
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        default = FakeGpuGenerator(DEVICE)
        grouped = torch.optim.Optimizer._group_tensors_by_device_and_dtype
        for owner, name, value in (
            (torch, "Generator", FakeGpuGenerator),
            (torch.cuda, "default_generators", (default,)),
            (torch.cuda, "manual_seed_all", default.manual_seed),
            (torch.cuda, "Event", _Event),
            (torch.cuda, "get_device_name", lambda device: "a GPU that is not there"),
            (torch.cuda, "get_device_capability", lambda device: (9, 0)),
            (torch.cuda, "max_memory_allocated", lambda device: 0),
            (torch.cuda, "max_memory_reserved", lambda device: 0),
            (torch.cuda, "reset_peak_memory_stats", lambda device: None),
            (torch.optim.Optimizer, "_group_tensors_by_device_and_dtype",
             staticmethod(lambda *args, **kwargs: _by_named_device(grouped(*args, **kwargs)))),
        ):
            self.enter_context(mock.patch.object(owner, name, value))
        self.enter_context(_Placing())
        _waits.clear()
        return self


def _place(device) -> torch.device:
    return DEVICE if torch.device(device).type == "cuda" else torch.device(device)


def _mapped(function, x):
    """Returns x with `function` applied to every tensor in it."""
    if isinstance(x, torch.Tensor):
        return function(x)
    return type(x)(_mapped(function, y) for y in x) if isinstance(x, list | tuple) else x


def _held(x):
    return x.held if isinstance(x, FakeGpuTensor) else x


def _beside(other: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Returns `x`, of the CPU, on the other's device."""
    return FakeGpuTensor(x) if isinstance(other, FakeGpuTensor) else x


def _pinned(x: torch.Tensor) -> torch.Tensor:
    x.is_fake_pinned = True
    return x


def _moved(args, kwargs) -> torch.Tensor:
    """Returns what `Tensor.to` does."""
    source, *rest = args
    options = {"device": None, **kwargs}
    for x in rest:
        if isinstance(x, bool):
            options["copy" if "non_blocking" in options else "non_blocking"] = x
        elif isinstance(x, torch.Tensor):
            options |= {"device": x.device, "dtype": x.dtype}
        elif x is not None:
            options["dtype" if isinstance(x, torch.dtype) else "device"] = x
    device, non_blocking = options.pop("device"), options.pop("non_blocking", False)
    device = source.device if device is None else _place(device)
    if DEVICE not in (device, source.device):
        return source.to(device, **options)
    result = source.to(**options) if options else source
    if device == source.device:
        return result
    assert not (torch.is_grad_enabled() and source.requires_grad), "gradients stay on their device"
    result = _held(result).clone() if device == _CPU else FakeGpuTensor(result.clone())
    _note_copy(result, source, non_blocking)
    return result


def _note_copies(args, kwargs) -> None:
    targets, sources = (x if isinstance(x, list | tuple) else [x] for x in args[:2])
    non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
    for target, source in zip(targets, sources, strict=True):
        _note_copy(target, source, non_blocking)


def _note_copy(target: torch.Tensor, source: torch.Tensor, non_blocking: bool) -> None:
    """Notes a copy, if it is from one to the other and the host waits for it."""
    to_device, from_device = (isinstance(x, FakeGpuTensor) for x in (target, source))
    on_host = source if to_device else target
    if to_device != from_device and not (non_blocking and hasattr(on_host, "is_fake_pinned")):
        _waits.append("copy to the device" if to_device else "copy to the host")


def _check_indices(func, args) -> None:
    """Checks the tensors that are indexed; indices themselves may be on the CPU, and are copied."""
    indexed, indices, *values = args
    if any(x is not None and not isinstance(x, FakeGpuTensor) for x in indices):
        _waits.append("copy to the device")
    values = [x for x in values if isinstance(x, torch.Tensor) and x.ndim]
    _check_devices(func, [indexed, *values], args)


def _check_devices(func, tensors, args) -> None:
    """Raises RuntimeError where a GPU would not run `func` on these tensors among its `args`."""
    is_elementwise = torch.Tag.pointwise in func.tags
    changed = args[0] if func._schema.is_mutable else None
    if any(not isinstance(x, FakeGpuTensor)
           and not (is_elementwise and x.ndim == 0 and x is not changed) for x in tensors):
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, but found "
                           f"some on {DEVICE} and some on the CPU")


def _check_generator(generator, device: torch.device | None, args) -> None:
    if generator is None:
        return
    if device is None:
        device = next((x.device for x in args if isinstance(x, torch.Tensor)), _CPU)
    if generator.device != device:
        raise RuntimeError(f"expected a generator of {device}, but found one of {generator.device}")


def _by_named_device(groups: dict) -> dict:
    """Returns tensors grouped by device and type, under the device that they say they are on."""
    return {(next(x for x in lists[0] if x is not None).device, dtype): (lists, indices)
            for (_, dtype), (lists, indices) in groups.items()}
