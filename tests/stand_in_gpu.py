"""A GPU for machines that have none: tensors that say cuda:0 and compute on the CPU.

Mixing devices in one operation raises as on a GPU, and every operation for which the host would
wait is noted. torch's FakeTensorMode knows shapes only, so it stops wherever a value decides what
happens next (lengths of clips, early stopping, redrawn masks); here all of it runs, with values.

Autograd and dispatcher see the device "meta", which needs no driver; Python code sees cuda:0. Pass
"cuda:0": with "cuda" alone, C++ asks the driver for the number. One thread only: others do not see
the mode.
"""

import sys
import time
from contextlib import contextmanager

import torch
import torch.utils._foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("cuda:0")
aten = torch.ops.aten
TAKES_INDEX_FROM_THE_HOST = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)
# the size or the meaning of their result is known to the device alone
WAITS = (
    *(aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero),
    *(aten.repeat_interleave, aten.bincount, aten._unique2, aten.unique_dim),
    aten.unique_consecutive,
)


class OnGPU(torch.Tensor):
    """A tensor of the stand-in; `host` has its values."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)
    is_cpu = is_meta = property(lambda self: False)

    @staticmethod
    def __new__(cls, host):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device="meta",
        )

    def __init__(self, host):
        self.host = host

    def __repr__(self, **_):
        return f"OnGPU({self.host!r})"

    def numpy(self, **_):
        raise TypeError(
            f"can't convert {DEVICE} device type tensor to numpy: use Tensor.cpu() first"
        )

    def tolist(self):
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return StandInGPU.current.compute(func, args, kwargs or {})


class StandInGPU(TorchDispatchMode):
    """While it is entered, cuda:0 exists.

    `waits` lists "file:function" of every operation that the host waits for, in order.
    """

    current = None

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.compute(func, args, kwargs or {})

    def compute(self, func, args, kwargs):
        """The operation. Subclasses and inference tensors do not go together: no_grad instead."""
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False), torch.no_grad():
                return self._compute(func, args, kwargs)
        return self._compute(func, args, kwargs)

    def _compute(self, func, args, kwargs):
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # without autograd nobody has taken it apart yet
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        ours = [x for x in tensors if isinstance(x, OnGPU)]
        packet = func.overloadpacket
        self._refuse_mixture(packet, tensors, ours)
        lands_here = bool(ours)
        if packet is aten.copy_:
            lands_here = isinstance(args[0], OnGPU)
        elif kwargs.get("device") is not None:
            lands_here = torch.device(kwargs["device"]).type != "cpu"
        masked = packet in TAKES_INDEX_FROM_THE_HOST and any(
            x.dtype == torch.bool for x in ours[1:]
        )
        if ours and (not lands_here or packet in WAITS or masked):
            self.waits.append(_caller())
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        known = {id(x.host): x for x in ours}  # what is changed in place comes back as itself
        args, kwargs = tree_map(lambda x: x.host if isinstance(x, OnGPU) else x, (args, kwargs))
        result = func(*args, **kwargs)
        return tree_map(lambda x: _wrapped(x, known, lands_here), result)

    @staticmethod
    def _refuse_mixture(packet, tensors, ours):
        if not ours or packet is aten.copy_ or packet in TAKES_INDEX_FROM_THE_HOST:
            return
        # as on a GPU, single numbers may come from the host
        others = [x for x in tensors if not isinstance(x, OnGPU) and x.dim()]
        if others:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but {packet} got {DEVICE} and "
                f"{others[0].device}, at {_caller()}"
            )


def _wrapped(x, known, lands_here):
    if not isinstance(x, torch.Tensor):
        return x
    if id(x) in known:
        return known[id(x)]
    return OnGPU(x) if lands_here else x


def _caller() -> str:
    """The nearest line that is neither torch's nor of this file."""
    frame = sys._getframe(1)
    while "/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__:
        frame = frame.f_back
    return f"{frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frame.f_code.co_name}"


class _Event:
    """A mark on the host's clock, which the stand-in's kernels keep pace with."""

    def __init__(self, enable_timing=False):
        self.seconds = None

    def record(self):
        self.seconds = time.perf_counter()

    def elapsed_time(self, later):
        return 1000 * (later.seconds - self.seconds)


class _Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        return torch._C.Generator()


@contextmanager
def stand_in_gpu(monkeypatch):
    """Enter a StandInGPU, with torch told that there is a GPU wherever it would ask the driver."""
    foreach = torch.utils._foreach_utils._get_foreach_kernels_supported_devices
    for place, name, value in (
        (torch, "Generator", _Generator),
        (torch.cuda, "Event", _Event),
        (torch.cuda, "_lazy_init", lambda: None),
        (torch.cuda, "set_device", lambda device: None),
        (torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
        (torch.cuda, "is_bf16_supported", lambda including_emulation=True: True),
        (torch.cuda, "max_memory_allocated", lambda device=None: 0),
        (torch.cuda, "mem_get_info", lambda device=None: (2**30, 2**30)),
        (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        (
            torch.utils._foreach_utils,
            "_get_foreach_kernels_supported_devices",
            lambda: [*foreach(), "meta"],
        ),
    ):
        monkeypatch.setattr(place, name, value)
    torch._C._set_only_lift_cpu_tensors(
        True
    )  # torch.tensor(..., device=...) goes by way of the CPU
    StandInGPU.current = StandInGPU()
    try:
        with StandInGPU.current as gpu:
            yield gpu
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
        StandInGPU.current = None
