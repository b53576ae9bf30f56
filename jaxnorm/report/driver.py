"""The few calls of the CUDA driver that JAX does not offer, through ctypes: libcuda comes with every driver."""

import contextlib
import ctypes
import random
import threading
from collections.abc import Iterator

# Enumerators and structures of cuda.h.
_MAX_DYNAMIC_SHARED_MEMORY, _CLUSTER_DIMENSION, _NON_BLOCKING = 8, 4, 1
_ATTRIBUTE_VALUE_BYTES = 64
_THREADS = 128

# Runs for so many nanoseconds. PTX of this version is understood by every driver that runs Ampere; clusters of it are
# made by the launch.
_PTX = b"""
.version 7.0
.target sm_80
.address_size 64
.visible .entry spin(.param .u64 nanoseconds)
{
    .reg .pred early;
    .reg .u64 start, now, wanted;
    ld.param.u64 wanted, [nanoseconds];
    mov.u64 start, %globaltimer;
again:
    mov.u64 now, %globaltimer;
    sub.u64 now, now, start;
    setp.lt.u64 early, now, wanted;
    @early bra again;
    ret;
}
"""


class LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = (
        ("id", ctypes.c_uint),
        ("pad", ctypes.c_char * 4),
        ("value", ctypes.c_uint * (_ATTRIBUTE_VALUE_BYTES // 4)),
    )


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_memory", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(LaunchAttribute)),
        ("attribute_count", ctypes.c_uint),
    )


class DriverError(Exception):
    """A call of the driver failed, or there is no driver."""


class Driver:
    """The first GPU, in the context that JAX uses too.

    Raises:
      DriverError: there is no driver, or it refuses.
    """

    def __init__(self) -> None:
        try:
            self._cuda = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise DriverError(str(error)) from error
        self._call("cuInit", 0)
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self._call("cuDeviceGet", ctypes.byref(device), 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._context = context
        self._call("cuCtxSetCurrent", context)
        module, self._spin = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(module), _PTX)
        self._call("cuModuleGetFunction", ctypes.byref(self._spin), module, b"spin")

    def cuda_version(self) -> str:
        """The newest CUDA that the driver knows."""
        version = ctypes.c_int()
        self._call("cuDriverGetVersion", ctypes.byref(version))
        return f"{version.value // 1000}.{version.value % 1000 // 10}"

    def clusters_that_fit(self, size: int, shared_memory: int) -> int:
        """How many clusters of so many thread blocks, with so many bytes each, the GPU runs at once."""
        self._call("cuFuncSetAttribute", self._spin, _MAX_DYNAMIC_SHARED_MEMORY, shared_memory)
        attribute = LaunchAttribute(id=_CLUSTER_DIMENSION)
        attribute.value[0:3] = [size, 1, 1]
        config = LaunchConfig(shared_memory=shared_memory, attribute_count=1)
        config.grid[:], config.block[:] = [size, 1, 1], [_THREADS, 1, 1]
        config.attributes = ctypes.pointer(attribute)
        clusters = ctypes.c_int()
        self._call("cuOccupancyMaxActiveClusters", ctypes.byref(clusters), self._spin, ctypes.byref(config))
        return clusters.value

    @contextlib.contextmanager
    def busy(self, blocks: int = 64) -> Iterator[None]:
        """Inside, another stream runs kernels of up to so many thread blocks, of random number and duration."""
        over, failure = threading.Event(), []

        def keep_busy() -> None:
            try:
                self._keep_busy(over, blocks)
            except DriverError as error:
                failure.append(error)

        thread = threading.Thread(target=keep_busy)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
        if failure:
            raise failure[0]

    def _keep_busy(self, over: threading.Event, blocks: int) -> None:
        chance, stream = random.Random(0), ctypes.c_void_p()
        # Contexts belong to threads.
        self._call("cuCtxSetCurrent", self._context)
        self._call("cuStreamCreate", ctypes.byref(stream), _NON_BLOCKING)
        while not over.is_set():
            for _ in range(16):
                nanoseconds = ctypes.c_uint64(chance.randint(1_000, 50_000))
                arguments = (ctypes.c_void_p * 1)(ctypes.addressof(nanoseconds))
                grid = (chance.randint(1, blocks), 1, 1)
                self._call("cuLaunchKernel", self._spin, *grid, _THREADS, 1, 1, 0, stream, arguments, None)
            self._call("cuStreamSynchronize", stream)
        self._call("cuStreamDestroy_v2", stream)

    def _call(self, name: str, *arguments: object) -> None:
        status = getattr(self._cuda, name)(*arguments)
        if status:
            text = ctypes.c_char_p()
            self._cuda.cuGetErrorName(status, ctypes.byref(text))
            raise DriverError(f"{name}: {(text.value or b'error %d' % status).decode()}")


def kernel_version() -> str | None:
    """The version of the driver itself, by NVML; None where there is none."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    text = ctypes.create_string_buffer(96)
    if nvml.nvmlInit_v2() or nvml.nvmlSystemGetDriverVersion(text, ctypes.c_uint(len(text))):
        return None
    return text.value.decode()
