"""Fill a `System` with facts about this machine. If something is absent, its field stays empty; that is no error."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import Distribution, distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from edgekit import machine
from edgekit.doctor import fatbin, providers
from edgekit.doctor.system import Blas, Cpu, Gpu, Jetson, Library, System
from edgekit.errors import EdgekitError

Run = Callable[..., tuple[int, str]]
FOLDERS = (  # folders of the CUDA libraries that the system installed
    "usr/lib/x86_64-linux-gnu", "usr/lib/aarch64-linux-gnu", "usr/lib64", "usr/local/cuda/lib64",
    "usr/local/cuda/targets/x86_64-linux/lib", "usr/local/cuda/targets/aarch64-linux/lib",
)  # fmt: skip
SYSTEM_LIBRARIES = re.compile(r"(libcudnn\w*|libcublas(?:Lt)?|libnvinfer\w*)\.so\.(\d[\d.]*)")
# distributions whose libraries a network needs on a GPU; NCCL, cuSPARSE and the like are not used by one
PACKAGES = re.compile(r"(nvidia-(cudnn|cublas|cufft|curand)-cu\d+|onnxruntime\S*|tensorrt\S*|torch|xllamacpp)")
SHARED = re.compile(r"\.so(\.\d+)*$")
# TensorRT 10.13 splits its resources by compute capability; cuFFT's interface for FFTW's callers has one stray kernel
APART = re.compile(r"builder_resource|libcufftw")
CUDA = re.compile(r"lib(cud|cublas|cufft|curand|nvinfer|nvonnx|nvrtc|nvidia)")
VARIABLES = (
    "OPENBLAS_CORETYPE", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES",
    "CUDA_MODULE_LOADING", "ORT_DISABLE_ALL", "CC",
)  # fmt: skip
NVCC = ("nvcc", "/usr/local/cuda/bin/nvcc")
LLAMA = "EDGEKIT_LLAMACPP"  # a library of llama.cpp, or the folder of a build of it
VENDOR = "0x10de"  # NVIDIA's on the PCI bus


def run(*command: str) -> tuple[int, str]:
    """Return the exit status of a program and what it printed to both streams; 127 if the program does not exist."""
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=15,
            check=False,
            errors="replace",
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired):
        return 127, ""
    return done.returncode, done.stdout.strip()


def observe(root: Path = Path("/"), run: Run = run) -> System:
    """Observe this machine. root: the root of its file system; run: starts a program on it. Tests replace both."""
    gpus, driver, cuda, problem = nvidia(run)
    on_bus, image = pci_gpus(root), jetson(root, run)
    with ThreadPoolExecutor(1) as pool:  # onnxruntime takes as long as all the rest
        asked = pool.submit(providers.observe, gpu=bool(gpus or on_bus or image)) if find_spec("onnxruntime") else None
        found = {i.metadata["Name"].lower().replace("_", "-"): i for i in distributions() if i.metadata["Name"]}
        memory, available = machine.memory_bytes(root)
        system, outside = system_libraries(root, run)
        trtexec = shutil.which("trtexec") or next(map(str, (root / "usr/src/tensorrt/bin").glob("trtexec")), "")
        nvcc = next(filter(None, (version(run(name, "--version"), r"release (\d[\d.]*)") for name in NVCC)), "")
        partial = System(
            machine=platform.machine(),
            os=platform.system(),
            python=platform.python_version(),
            system_python=version(run("/usr/bin/python3", "--version")),
            cpu=cpu(root),
            memory=memory,
            available=available,
            device_tree=device_tree(root),
            jetson=image,
            pci_gpus=on_bus,
            gpus=gpus,
            driver=driver,
            driver_problem=problem,
            cuda=cuda,
            nvcc=nvcc,
            trtexec=trtexec,
            system_libraries=system,
            libraries=(*outside, *packaged_libraries(found, run), *llama_libraries(run)),
            packages={name: item.version for name, item in sorted(found.items())},
            llama_cpp=llama_cpp(found),
            blas=blas(),
            compiler=compiler(run),
            environment={name: os.environ[name] for name in VARIABLES if os.environ.get(name)},
        )
        active, silent = asked.result() if asked else ((), "")
    return replace(partial, providers=active, providers_problem=silent)


def version(answer: tuple[int, str], pattern: str = r"(\d+\.\d[\d.]*)") -> str:
    """Return the first version number in the output of a program; "" if the program failed."""
    found = re.search(pattern, answer[1]) if answer[0] == 0 else None
    return found[1] if found else ""


def text(path: Path) -> str:
    """Return the text of a small file of the kernel or the system; "" if it does not exist."""
    try:
        return path.read_bytes().decode("utf-8", "replace")
    except OSError:
        return ""


def cpu(root: Path) -> Cpu:
    info = root / "proc/cpuinfo"
    values = dict(re.findall(r"^(vendor_id|flags|Features)\s*: (.*)$", text(info), re.MULTILINE))
    flags = tuple(sorted((values.get("flags") or values.get("Features") or "").split()))
    return Cpu(machine.cpu_name(info), values.get("vendor_id", ""), int(machine.describe()["cores"]), flags)


def device_tree(root: Path) -> tuple[str, ...]:
    """Return the model and the compatible strings of an ARM board."""
    folder = root / "proc/device-tree"
    strings = [part for name in ("model", "compatible") for part in text(folder / name).split("\0")]
    return tuple(part for part in strings if part)


def jetson(root: Path, run: Run) -> Jetson | None:
    """Return the versions and settings of NVIDIA's system image on a Jetson; None on other machines."""
    release = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", text(root / "etc/nv_tegra_release"))
    if release is None:
        return None
    mode = re.search(r"NV Power Mode: *(\S+)", run("nvpmodel", "-q")[1])
    shown = re.findall(r"MinFreq=(\d+) MaxFreq=(\d+)", run("jetson_clocks", "--show")[1])
    clocks = "" if not shown else "locked" if all(low == high for low, high in shown) else "free"
    jetpack = version(run("dpkg-query", "-W", "-f", "${Version}", "nvidia-jetpack"))
    return Jetson(f"{release[1]}.{release[2]}", jetpack, mode[1] if mode else "", clocks)  # type: ignore[arg-type]


def pci_gpus(root: Path) -> int:
    """Count NVIDIA's display controllers and accelerators (class 0x03....), with or without a driver."""
    devices = (root / "sys/bus/pci/devices").glob("*")
    return sum(text(d / "vendor").strip() == VENDOR and text(d / "class").startswith("0x03") for d in devices)


def nvidia(run: Run) -> tuple[tuple[Gpu, ...], str, str, str]:
    """Return the GPUs, the driver's version, the newest CUDA that it knows, and the error, from NVML or nvidia-smi."""
    try:
        return (*_nvml(), "")
    except Exception:  # no nvidia-ml-py, no driver, or one of another version: nvidia-smi says which
        pass
    columns = "name,compute_cap,memory.total,memory.free,driver_version"
    status, printed = run("nvidia-smi", f"--query-gpu={columns}", "--format=csv,noheader,nounits")
    if status and "compute_cap" in printed:  # drivers before 510
        status, printed = run(
            "nvidia-smi", f"--query-gpu={columns.replace('compute_cap', 'index')}", "--format=csv,noheader,nounits"
        )
    if status == 127 and not printed:
        return (), "", "", ""
    rows = [[cell.strip() for cell in line.split(",")] for line in printed.splitlines()]
    if status or any(len(row) != 5 for row in rows):
        return (), "", "", " ".join(printed.split())[:300]
    gpus = tuple(
        Gpu(name, capability if "." in capability else "", *(int(n) << 20 if n.isdigit() else 0 for n in (total, free)))
        for name, capability, total, free, _ in rows
    )
    return gpus, rows[0][4] if rows else "", version(run("nvidia-smi"), r"CUDA (?:UMD )?Version *: *([\d.]+)"), ""


def _nvml() -> tuple[tuple[Gpu, ...], str, str]:
    import pynvml

    pynvml.nvmlInit()
    try:
        gpus = []
        for number in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(number)
            major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            gpus.append(Gpu(_word(pynvml.nvmlDeviceGetName(handle)), f"{major}.{minor}", memory.total, memory.free))
        cuda = pynvml.nvmlSystemGetCudaDriverVersion_v2()
        return tuple(gpus), _word(pynvml.nvmlSystemGetDriverVersion()), f"{cuda // 1000}.{cuda % 1000 // 10}"
    finally:
        pynvml.nvmlShutdown()


def _word(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)  # bytes before nvidia-ml-py 12


def system_libraries(root: Path, run: Run) -> tuple[dict[str, str], tuple[Library, ...]]:
    """Return the versions of cuDNN, cuBLAS and TensorRT outside of Python by name, and the libraries themselves."""
    folders = [root / name for name in FOLDERS]
    folders += [Path(name) for name in os.environ.get("LD_LIBRARY_PATH", "").split(":") if name]
    files = {
        file.resolve() for folder in folders for file in folder.glob("lib*.so.*") if SYSTEM_LIBRARIES.match(file.name)
    }
    versions: dict[str, str] = {}
    found = []
    known = _loadable(run) if files else None
    for file in sorted(files):
        if (named := SYSTEM_LIBRARIES.fullmatch(file.name)) is None:
            continue
        if named[2].count(".") >= versions.get(named[1], "").count("."):
            versions[named[1]] = named[2]
        found.append(_library(file, str(file.parent), named[2], known))
    return versions, tuple(found)


def packaged_libraries(found: Mapping[str, Distribution], run: Run) -> Iterator[Library]:
    """Yield the GPU libraries that pip installed."""
    files: dict[Path, str] = {}
    for name, item in sorted(found.items()):
        if not PACKAGES.fullmatch(name):
            continue
        if name == "torch":  # its list of files has tens of thousands
            paths = sorted(Path(str(item.locate_file("torch/lib"))).glob("libtorch_cuda*.so"))
        else:
            paths = [Path(str(file.locate())) for file in item.files or () if SHARED.search(file.name)]
        files |= {path: name for path in paths if path.is_file() and not APART.search(path.name)}
    known = _loadable(run) if files else None
    if known is not None:
        known |= {path.name for path in files}
    for path, name in files.items():
        library = _library(path, name, found[name].version, known)
        if library.code or library.problem or any(map(CUDA.match, library.needed)):
            yield library


def llama_cpp(found: Mapping[str, Distribution]) -> str:
    """Return which build of llama.cpp the engine `llamacpp` loads, and for which CPUs a folder has code; "" if none."""
    if chosen := os.environ.get(LLAMA):
        parts = sorted(path.name for path in _llama_folder(chosen).glob("libggml-cpu-*.so"))
        cpus = ", ".join(name.removeprefix("libggml-cpu-").removesuffix(".so") for name in parts)
        return f"{chosen}{f', code for {cpus}' * bool(cpus)}"
    return f"xllamacpp {found['xllamacpp'].version}" if "xllamacpp" in found else ""


def llama_libraries(run: Run) -> Iterator[Library]:
    """Yield the libraries with GPU code of the llama.cpp that $EDGEKIT_LLAMACPP names."""
    if not (chosen := os.environ.get(LLAMA)):
        return
    known = _loadable(run)
    for path in sorted(_llama_folder(chosen).glob("lib*.so*")):
        library = _library(path, "llama.cpp", "", known)
        if library.code or library.problem:
            yield library


def _llama_folder(chosen: str) -> Path:
    return Path(chosen).parent if Path(chosen).is_file() else Path(chosen)


def _library(path: Path, package: str, number: str, known: set[str] | None) -> Library:
    try:
        code = fatbin.read(path)
    except EdgekitError as error:
        return Library(path.name, package, number, problem=str(error))
    needed = tuple(name for name in code.needed if CUDA.match(name))
    missing = () if known is None else tuple(name for name in needed if name not in known)
    return Library(path.name, package, number, code.sms, code.ptx, needed, missing)


def _loadable(run: Run) -> set[str] | None:
    """Return the library names that the loader knows; None if it does not list them."""
    status, printed = run("ldconfig", "-p")
    if status == 127:
        status, printed = run("/sbin/ldconfig", "-p")
    names = set(re.findall(r"^\s+(\S+) \(", printed, re.MULTILINE))
    folders = [Path(name) for name in os.environ.get("LD_LIBRARY_PATH", "").split(":") if name]
    folders += Path(sysconfig.get_path("purelib")).glob("nvidia/*/lib")  # CUDA packages that were not listed
    return None if status else names | {file.name for folder in folders for file in folder.glob("*.so*")}


def blas() -> tuple[Blas, ...]:
    """Return the linear algebra libraries that NumPy loaded, and their kernels; empty without threadpoolctl."""
    try:
        import numpy as np
        import threadpoolctl

        np.ones(1) @ np.ones(1)
        pools = [pool for pool in threadpoolctl.threadpool_info() if pool.get("user_api") == "blas"]
    except Exception:  # not installed, or a library that it does not know
        return ()
    return tuple(
        Blas(str(p.get("internal_api", "")), str(p.get("version") or ""), str(p.get("architecture") or ""))
        for p in pools
    )


def compiler(run: Run) -> str:
    """Return the first line of the version text of the C compiler: $CC, otherwise cc, gcc or clang."""
    for name in filter(None, (os.environ.get("CC"), "cc", "gcc", "clang")):
        status, printed = run(name, "--version")
        if status == 0 and printed:
            return printed.splitlines()[0]
    return ""
