"""A GPU that is none: tensors that say they are on `cuda:0`, compute on the CPU, and refuse what CUDA refuses.

Refused are operations on tensors of both devices (0-dim CPU tensors, copies and indices on the CPU are fine, as in
CUDA), draws on the device by a CPU generator, `numpy()`, and pinning. So a tensor that was left or made on the wrong
device is found without a GPU. Not found is what only real kernels do: memory, speed, streams, rounding.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

GPU = torch.device("cuda", 0)
aten = torch.ops.aten
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
"""Take indices from the CPU too."""
NEW = {aten.new_zeros.default, aten.new_empty.default, aten.new_empty_strided.default, aten.new_full.default}
"""Are told the true device by C++ code (backward formulas, norms), as `_to_copy` is."""
_leaves: list[bool] = []
"""Not empty while Python itself moves a tensor to the CPU."""
MATH_ATTENTION = 0
"""The attention that is made of other operations; fused kernels are picked by the true device."""


class OnGpu(torch.Tensor):
    """A tensor of the pretended GPU; `inner` has its values."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "OnGpu":
        # The C++ side, which has no CUDA, must see the true device; Python sees the pretended one.
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=inner.device,
        )

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: Mapping[str, torch.Tensor], _meta: None, _size: Any, _stride: Any) -> "OnGpu":
        return OnGpu(inner["inner"])

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.Tensor.type_as and isinstance(args[0], OnGpu):
            return args[0].to(args[1])
        if func in (torch.Tensor.to, torch.Tensor.type_as) and not isinstance(args[0], OnGpu):
            return aten._to_copy(args[0], dtype=args[1].dtype, device=GPU)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _dispatch(func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:
        return f"OnGpu({self.detach().inner!r})"

    @property
    def device(self) -> torch.device:
        return GPU

    @property
    def is_cuda(self) -> bool:
        return True

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, value: "OnGpu") -> None:
        torch.Tensor.data.__set__(self, value)
        self.inner = value.inner

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        copy = kwargs.pop("copy", False)
        if args and isinstance(args[0], torch.Tensor):
            device, dtype = args[0].device, args[0].dtype
        else:
            device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and device.type != "cuda":
            with _leaving():
                return aten._to_copy(self, dtype=dtype, device=device)
        if dtype in (None, self.dtype):
            return self.clone() if copy else self
        return torch.Tensor.to(self, dtype=dtype)

    def cpu(self) -> torch.Tensor:
        return self.to("cpu")

    def cuda(self, *_: Any, **__: Any) -> "OnGpu":
        return self

    def tolist(self) -> list:
        return self.detach().inner.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    def pin_memory(self, *_: Any) -> "OnGpu":
        raise RuntimeError("only tensors of the CPU can be pinned")

    def untyped_storage(self) -> Any:  # by which safetensors knows tensors that share memory
        return self.detach().inner.untyped_storage()

    def data_ptr(self) -> int:
        return self.detach().inner.data_ptr()


class _Pretended(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._mode_key = torch._C._TorchDispatchModeKey.FAKE  # for it torch does not look for a driver

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _dispatch(func, args, kwargs or {})


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """While it lasts, `cuda:0` is the pretended GPU."""
    torch._C._set_only_lift_cpu_tensors(True)  # so that torch.tensor(..., device=GPU) copies by way of the mode
    torch.__future__.set_swap_module_params_on_conversion(True)  # a parameter's class changes with its device
    try:
        with _Pretended():
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
        torch.__future__.set_swap_module_params_on_conversion(False)


@contextmanager
def _leaving() -> Iterator[None]:
    _leaves.append(True)
    try:
        yield
    finally:
        _leaves.pop()


def _leaves_of(value: Any) -> Iterator[Any]:
    """What is in the arguments of an operation; torch's own trees know more containers, and take most of the time."""
    if isinstance(value, (tuple, list)):
        for part in value:
            yield from _leaves_of(part)
    elif isinstance(value, dict):
        yield from _leaves_of(list(value.values()))
    else:
        yield value


def _mapped(kind: type, change: Callable[[Any], Any], value: Any) -> Any:
    """The arguments, or the results, of an operation with a change of all that is of a kind."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, (tuple, list)):
        return type(value)([_mapped(kind, change, part) for part in value])
    if isinstance(value, dict):
        return {key: _mapped(kind, change, part) for key, part in value.items()}
    return value


def _dispatch(func: Any, args: tuple, kwargs: dict) -> Any:
    leaves = list(_leaves_of((args, kwargs)))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    held = [tensor for tensor in tensors if isinstance(tensor, OnGpu)]
    if func is aten._fused_sdp_choice.default:
        return MATH_ATTENTION
    asked = kwargs.get("device")
    onto = torch.device(asked).type == "cuda" if asked is not None else bool(held)
    if held and (func in NEW or (func is aten._to_copy.default and not _leaves)):
        onto = True
    _refuse(func, args, tensors, held, [each for each in leaves if isinstance(each, torch.Generator)], onto)
    if func is aten.copy_.default:
        onto = isinstance(args[0], OnGpu)
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    inner_args, inner_kwargs = _mapped(OnGpu, lambda tensor: tensor.inner, (args, kwargs))
    out = func(*inner_args, **inner_kwargs)
    if not onto:
        return out
    known = {id(tensor.inner): tensor for tensor in held}  # what is changed in place is given back itself
    wrapped = _mapped(torch.Tensor, lambda tensor: known[id(tensor)] if id(tensor) in known else OnGpu(tensor), out)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if held else wrapped


def _refuse(
    func: Any, args: tuple, tensors: Sequence[torch.Tensor], held: Sequence[OnGpu], generators: Sequence, onto: bool
) -> None:
    apart = [tensor for tensor in tensors if not isinstance(tensor, OnGpu) and tensor.dim() > 0]
    if held and apart and func is not aten.copy_.default:
        fine = func in INDEXED and isinstance(args[0], OnGpu) and (len(args) < 3 or isinstance(args[2], OnGpu))
        if not fine:
            devices = [f"{tensor.device} {tuple(tensor.shape)}" for tensor in tensors]
            raise RuntimeError(f"{func}: tensors on two devices: {', '.join(devices)}")
    if onto and any(generator.device.type == "cpu" for generator in generators):
        raise RuntimeError(f"{func}: a generator of the CPU cannot draw on the GPU")
