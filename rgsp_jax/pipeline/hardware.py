"""What kinds of devices a merge can be planned for, and where every number of theirs comes from."""

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np

from rgsp_jax.errors import RefusedError

Origin = Literal["published", "derived", "measured", "assumed"]
TPU_DOCS, NVIDIA = "Cloud TPU documentation, {}", "NVIDIA's data sheet, {}"
SIX_PASSES = "{} published for bfloat16; XLA takes six such passes for a product accurate in float32"
STORAGE = "of a file system that hosts share; no host's was measured"
COMMAND = "python -m experiments.benchmarks.scaling"


class Figure(NamedTuple):
    """A number and where it comes from."""

    value: float
    unit: str
    origin: Origin
    """published by the vendor, derived from what is, measured by a command of ours, or assumed."""
    source: str


def published(value: float, unit: str, source: str) -> Figure:
    """What the vendor says."""
    return Figure(value, unit, "published", source)


def assumed(value: float, unit: str, source: str) -> Figure:
    """What nobody measured here."""
    return Figure(value, unit, "assumed", source)


@dataclass(frozen=True)
class DeviceKind:
    """One kind of device with the host that it is in. Rates are a second's."""

    name: str
    platform: str
    """As JAX calls it."""
    per_host: int
    """Devices of each host, where there are several hosts."""
    memory: Figure | None
    """Bytes of one device; None is the host's."""
    host_memory: Figure | None
    """Bytes; None is not known."""
    matmul: Figure
    """Floating-point operations of products accurate in float32: of one device, or of the host where `shared`."""
    bandwidth: Figure
    """Bytes between a device and its memory, or of the host where `shared`."""
    transfer: Figure | None
    """Bytes between host and one device, either way; None where nothing has to move."""
    read: Figure
    """Bytes that one host reads from where the models are."""
    write: Figure
    hash: Figure
    """Bytes that one thread takes through SHA-256."""
    share: Figure
    """Of `matmul` that methods which take matrices apart reach."""
    compilation: Figure
    """Seconds for one shape of such a method."""
    fixed: Figure
    """Seconds of a merge of next to nothing, in processes that have started."""
    shared: bool = False
    """Devices, and processes on one host, have its arithmetic and memory together: simulated ones."""

    @property
    def figures(self) -> dict[str, Figure]:
        """All numbers by name."""
        return {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Figure)}

    def describe(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "name": self.name,
            "devices_per_host": self.per_host,
            "figures": {name: figure._asdict() for name, figure in self.figures.items()},
        }


BYTES, RATE, FLOPS = "B", "B/s", "FLOP/s"
FACTORS = assumed(0.05, "", "no factorisation was measured on such a device")
COMPILED = assumed(30.0, "s", "no compilation was measured for such a device")
FIXED = assumed(1.0, "s", "files opened, checked, noted and named on a file system that hosts share")
HASHED = assumed(1e9, RATE, "no such host was measured")


def _gpu(name: str, memory: float, bandwidth: float, sheet: str) -> DeviceKind:
    """A GPU of eight in a host."""
    where = NVIDIA.format(sheet)
    return DeviceKind(
        name=name,
        platform="gpu",
        per_host=8,
        memory=published(memory, BYTES, where),
        host_memory=None,
        matmul=published(67e12, FLOPS, where + ", float32 without tensor cores"),
        bandwidth=published(bandwidth, RATE, where),
        transfer=assumed(25e9, RATE, "pageable memory; the link, PCIe of generation 5, is published as 64e9 each way"),
        read=assumed(2e9, RATE, STORAGE),
        write=assumed(1e9, RATE, STORAGE),
        hash=HASHED,
        share=FACTORS,
        compilation=COMPILED,
        fixed=FIXED,
    )


def _tpu(name: str, memory: float, host_memory: float, bfloat16: float, bandwidth: float, page: str) -> DeviceKind:
    """A TPU of four in a host, as in slices of several hosts."""
    where = TPU_DOCS.format(page)
    return DeviceKind(
        name=name,
        platform="tpu",
        per_host=4,
        memory=published(memory, BYTES, where),
        host_memory=published(host_memory, BYTES, where + ", machine of four chips"),
        matmul=Figure(bfloat16 / 6, FLOPS, "derived", SIX_PASSES.format(f"{bfloat16:.3g}")),
        bandwidth=published(bandwidth, RATE, where),
        transfer=assumed(10e9, RATE, "not published"),
        read=assumed(1e9, RATE, STORAGE),
        write=assumed(0.5e9, RATE, STORAGE),
        hash=HASHED,
        share=FACTORS,
        compilation=COMPILED,
        fixed=FIXED,
    )


KINDS: Mapping[str, DeviceKind] = MappingProxyType(
    {
        kind.name: kind
        for kind in (
            _gpu("h100", 80e9, 3.35e12, "H100 SXM"),
            _gpu("h200", 141e9, 4.8e12, "H200 SXM"),
            _tpu("tpu-v5e", 16e9, 192e9, 197e12, 819e9, "TPU v5e"),
            _tpu("tpu-v5p", 95e9, 448e9, 459e12, 2765e9, "TPU v5p"),
        )
    }
)
"""By name; `cpu` beside them is measured where it is asked for."""
JAX_NAMES = (("H100", "h100"), ("H200", "h200"), ("TPU v5 lite", "tpu-v5e"), ("TPU v5", "tpu-v5p"))
"""Part of what JAX calls a device -> kind; the first that is found."""


def find_kind(name: str) -> DeviceKind:
    """The kind of this name; RefusedError with all names for another."""
    if name == "cpu":
        return measure_host()
    if name not in KINDS:
        raise RefusedError(f"--device-kind {name}: not known; there are cpu, {', '.join(KINDS)}")
    return KINDS[name]


def recognise_kind(platform: str, device_kind: str) -> DeviceKind:
    """The kind of a device that is here, by JAX's names; what no table has is taken for this host."""
    known = next((kind for part, kind in JAX_NAMES if part.lower() in device_kind.lower()), None)
    return KINDS[known] if platform != "cpu" and known else measure_host()


def measure_host() -> DeviceKind:
    """This host's processors as devices: measured now, in a fraction of a second, but for what is said."""
    here = "here, when planned: {}"
    return DeviceKind(
        name="cpu",
        platform="cpu",
        per_host=1,
        memory=None,
        host_memory=None,
        matmul=Figure(measure_flops(), FLOPS, "measured", here.format("a float32 product of 768 x 768")),
        bandwidth=Figure(measure_bandwidth(), RATE, "measured", here.format("copying 32 MB")),
        transfer=None,
        read=assumed(0.8e9, RATE, "where the page cache helps; no disk was asked"),
        write=assumed(0.8e9, RATE, "where the page cache helps; no disk was asked"),
        hash=Figure(measure_hashing(), RATE, "measured", here.format("SHA-256 of 4 MB")),
        share=Figure(0.07, "", "measured", COMMAND + ": `relative` of 256 x 256, one thread; others differ"),
        compilation=assumed(3.0, "s", "an order of magnitude"),
        fixed=Figure(0.023, "s", "measured", COMMAND),
        shared=True,
    )


def best_rate(amount: float, work: Callable[[], object], rounds: int = 3) -> float:
    """Amount a second in the best of a few rounds, which other work disturbs least."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return amount / max(min(times), 1e-9)


def measure_flops(size: int = 768) -> float:
    """Floating-point operations a second of a float32 matrix product here."""
    a = np.ones((size, size), np.float32)
    return best_rate(2 * size**3, lambda: a @ a)


def measure_bandwidth(size: int = 32_000_000) -> float:
    """Bytes read and written a second while memory is copied."""
    source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
    return best_rate(2 * size, lambda: np.copyto(target, source))


def measure_hashing(size: int = 4_000_000) -> float:
    """Bytes a second through SHA-256 in one thread."""
    data = bytes(size)
    return best_rate(size, lambda: hashlib.sha256(data))
