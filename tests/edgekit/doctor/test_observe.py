"""Probes run on artificial file systems and programs: a Jetson, a P40 machine, a container, and an empty machine."""

import sys
from types import SimpleNamespace

import pytest

from edgekit.doctor import observe as module
from edgekit.doctor.observe import (
    blas,
    compiler,
    cpu,
    device_tree,
    jetson,
    llama_cpp,
    llama_libraries,
    nvidia,
    observe,
    packaged_libraries,
    pci_gpus,
    run,
    system_libraries,
    version,
)
from edgekit.doctor.system import Gpu, Jetson
from tests.edgekit.doctor.elves import MACHINE_CODE, PTX, container, elf, entry

SMI = "Tesla P40, 6.1, 24576, 24000, 580.95.05\n"


def programs(answers):
    """Return run(*command), which answers by the command's beginning; an unknown command ends with 127."""

    def answer(*command):
        line = " ".join(command)
        return next(
            ((0, text) if isinstance(text, str) else text for start, text in answers.items() if line.startswith(start)),
            (127, ""),
        )

    return answer


@pytest.fixture
def tree(tmp_path):
    """Return tree(path=content), which makes a file system with these files."""

    def build(**files):
        for name, content in files.items():
            path = tmp_path / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return tmp_path

    return build


@pytest.fixture(autouse=True)
def no_nvml(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)


def test_a_machine_with_nothing_on_it(tmp_path, monkeypatch):
    """Without /proc, programs and a compiler, the system is empty, and there is no exception."""
    monkeypatch.setattr(module.providers, "observe", lambda gpu: ((), "silent"))
    system = observe(tmp_path, programs({}))
    assert (system.memory, system.gpus, system.driver, system.compiler, system.jetson) == (0, (), "", "", None)
    assert system.providers_problem == "silent"
    assert system.cpu.flags == ()


def test_this_machine(monkeypatch):
    monkeypatch.setattr(module.providers, "observe", lambda gpu: ((), ""))
    system = observe()
    assert system.machine
    assert "numpy" in system.packages
    assert system.memory > system.available > 0
    assert system.cpu.cores >= 1
    assert system.python == ".".join(map(str, sys.version_info[:3]))


def test_a_jetson(tree):
    root = tree(
        proc__device_tree__x="", etc__nv_tegra_release="# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic"
    )
    folder = root / "proc/device-tree"
    folder.mkdir(parents=True)
    (folder / "model").write_bytes(b"NVIDIA Jetson Orin Nano Developer Kit\0")
    (folder / "compatible").write_bytes(b"nvidia,p3768-0000+p3767-0005\0nvidia,p3767-0005\0nvidia,tegra234\0")
    assert device_tree(root) == (
        "NVIDIA Jetson Orin Nano Developer Kit",
        "nvidia,p3768-0000+p3767-0005",
        "nvidia,p3767-0005",
        "nvidia,tegra234",
    )
    shown = "cpu0: Online=1 Governor=schedutil MinFreq=1510400 MaxFreq=1510400 CurrentFreq=1510400\nGPU MinFreq={} "
    shown += "MaxFreq=624750000 CurrentFreq=624750000"
    found = {"nvpmodel -q": "NV Power Mode: 15W\n0", "dpkg-query": "6.2+b77"}
    for low, clocks in ((624750000, "locked"), (306000000, "free")):
        assert jetson(root, programs(found | {"jetson_clocks": shown.format(low)})) == Jetson(
            "36.4.3", "6.2", "15W", clocks
        )
    assert jetson(root, programs({})) == Jetson("36.4.3")
    assert jetson(root / "proc", programs(found)) is None


def test_nvidia_smi():
    answers = {
        "nvidia-smi --query-gpu=name,compute_cap": SMI,
        "nvidia-smi": "| Driver Version: 580 CUDA Version: 13.0 |",
    }
    gpu = Gpu("Tesla P40", "6.1", 24576 << 20, 24000 << 20)
    assert nvidia(programs(answers)) == ((gpu,), "580.95.05", "13.0", "")


def test_an_nvidia_smi_that_does_not_know_compute_cap():
    answers = {
        "nvidia-smi --query-gpu=name,compute_cap": (2, 'Field "compute_cap" is not a valid field to query.'),
        "nvidia-smi --query-gpu=name,index": "Tesla P40, 0, 24576, 24000, 470.57\n",
        "nvidia-smi": "CUDA Version: 11.4",
    }
    gpus, driver, cuda, problem = nvidia(programs(answers))
    assert (gpus[0].name, gpus[0].compute_capability, driver, cuda, problem) == ("Tesla P40", "", "470.57", "11.4", "")


@pytest.mark.parametrize(
    "failure",
    ["Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 580.95", "No devices"],
)
def test_a_driver_that_fails(failure):
    assert nvidia(programs({"nvidia-smi": (18, failure)})) == ((), "", "", " ".join(failure.split()))


def test_no_driver():
    assert nvidia(programs({})) == ((), "", "", "")


def test_nvml_goes_first(monkeypatch):
    fake = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda number: number,
        nvmlDeviceGetCudaComputeCapability=lambda handle: (8, 6),
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(total=12, free=11),
        nvmlDeviceGetName=lambda handle: b"NVIDIA GeForce RTX 3060",
        nvmlSystemGetCudaDriverVersion_v2=lambda: 12020,
        nvmlSystemGetDriverVersion=lambda: "535.183.01",
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    assert nvidia(programs({"nvidia-smi": SMI})) == (
        (Gpu("NVIDIA GeForce RTX 3060", "8.6", 12, 11),),
        "535.183.01",
        "12.2",
        "",
    )


def test_gpus_on_the_bus(tmp_path):
    for name, vendor, kind in (("a", "0x10de", "0x030200"), ("b", "0x10de", "0x040300"), ("c", "0x1002", "0x030000")):
        folder = tmp_path / "sys/bus/pci/devices" / name
        folder.mkdir(parents=True)
        (folder / "vendor").write_text(vendor + "\n")
        (folder / "class").write_text(kind + "\n")
    assert pci_gpus(tmp_path) == 1  # not its sound, not another vendor's


@pytest.mark.parametrize(
    ("text", "name", "flags"),
    [
        ("vendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC\nflags\t\t: fpu avx2 avx512f\n", "AMD EPYC", "avx2"),
        ("processor\t: 0\nFeatures\t: fp asimd asimddp\nCPU implementer\t: 0x41\nHardware\t: X\n", "X", "asimddp"),
    ],
)
def test_cpu_flags_of_both_architectures(text, name, flags, tree):
    found = cpu(tree(proc__cpuinfo=text))
    assert found.name == name
    assert flags in found.flags


def test_libraries_outside_of_python(tmp_path, monkeypatch):
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    folder = tmp_path / "usr/lib/aarch64-linux-gnu"
    folder.mkdir(parents=True)
    code = elf({".nv_fatbin": container(entry(MACHINE_CODE, 87))}, ("libcudart.so.12", "libc.so.6"))
    (folder / "libnvinfer.so.10.3.0").write_bytes(code)
    (folder / "libnvinfer.so.10").symlink_to("libnvinfer.so.10.3.0")
    (folder / "libcudnn_ops.so.9.3.0").write_bytes(b"not ELF")
    (folder / "libcudnn.so.9.3.0").write_bytes(elf({}))
    (folder / "libother.so.1").write_bytes(code)
    versions, libraries = system_libraries(tmp_path, programs({"ldconfig -p": "\tlibother.so.1 (libc6) => /x"}))
    assert versions == {"libnvinfer": "10.3.0", "libcudnn": "9.3.0", "libcudnn_ops": "9.3.0"}
    by_name = {library.name: library for library in libraries}
    assert set(by_name) == {"libnvinfer.so.10.3.0", "libcudnn.so.9.3.0", "libcudnn_ops.so.9.3.0"}
    found = by_name["libnvinfer.so.10.3.0"]
    assert (found.sms, found.needed, found.missing) == ((87,), ("libcudart.so.12",), ("libcudart.so.12",))
    assert "not an ELF file" in by_name["libcudnn_ops.so.9.3.0"].problem


class Installed:
    """A distribution whose files lie in a folder."""

    version = "1.26.0"

    def __init__(self, folder):
        self.files = [SimpleNamespace(name=path.name, locate=lambda path=path: path) for path in folder.iterdir()]


def test_libraries_of_packages(tmp_path):
    provider = elf(
        {".nv_fatbin": container(entry(MACHINE_CODE, 60))}, ("libcublas.so.12", "libbrother.so", "libc.so.6")
    )
    for name, content in {
        "libonnxruntime_providers_cuda.so": provider,
        "libonnxruntime.so.1.26.0": elf({}, ("libc.so.6",)),
        "readme.txt": b"",
        "libnvinfer_builder_resource_sm75.so.10": provider,
    }.items():
        (tmp_path / name).write_bytes(content)
    known = programs({"ldconfig -p": "\tlibcublas.so.12 (libc6,x86-64) => /x\n"})
    found = {"onnxruntime-gpu": Installed(tmp_path), "requests": Installed(tmp_path)}
    (library,) = packaged_libraries(found, known)
    assert (library.name, library.package, library.sms) == (
        "libonnxruntime_providers_cuda.so",
        "onnxruntime-gpu",
        (60,),
    )
    assert (library.needed, library.missing) == (("libcublas.so.12",), ())
    (library,) = packaged_libraries(found, programs({"ldconfig -p": ""}))
    assert library.missing == ("libcublas.so.12",)
    (library,) = packaged_libraries(found, programs({}))  # a loader that does not tell: nothing is said to be missing
    assert library.missing == ()


def test_the_build_of_llama_cpp_and_its_gpus(tmp_path, monkeypatch):
    monkeypatch.delenv(module.LLAMA, raising=False)
    assert llama_cpp({}) == ""
    assert llama_cpp({"xllamacpp": Installed(tmp_path)}) == "xllamacpp 1.26.0"
    assert list(llama_libraries(programs({}))) == []
    gpu = elf({".nv_fatbin": container(entry(PTX, 61), entry(MACHINE_CODE, 86))}, ("libcublas.so.12",))
    plain = elf({}, ("libc.so.6",))
    names = ("libllama.so", "libggml-cpu-haswell.so", "libggml-cpu-zen4.so")
    for name, content in {"libggml-cuda.so": gpu, **dict.fromkeys(names, plain)}.items():
        (tmp_path / name).write_bytes(content)
    for chosen in (tmp_path, tmp_path / "libllama.so"):
        monkeypatch.setenv(module.LLAMA, str(chosen))
        assert llama_cpp({"xllamacpp": Installed(tmp_path)}) == f"{chosen}, code for haswell, zen4"
        (library,) = llama_libraries(programs({"ldconfig -p": ""}))
        assert (library.name, library.package, library.sms, library.ptx) == (
            "libggml-cuda.so",
            "llama.cpp",
            (86,),
            (61,),
        )
        assert library.missing == ("libcublas.so.12",)


def test_versions_and_compilers(monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    assert version((0, "Cuda compilation tools, release 12.6, V12.6.68"), r"release (\d[\d.]*)") == "12.6"
    assert version((1, "release 12.6")) == version((0, "none")) == ""
    assert compiler(programs({"gcc": "gcc 12.2\nCopyright", "clang": "clang 15"})) == "gcc 12.2"
    monkeypatch.setenv("CC", "clang")
    assert compiler(programs({"gcc": "gcc 12.2", "clang": "clang 15"})) == "clang 15"
    assert compiler(programs({})) == ""


def test_programs_that_are_not_there_or_fail():
    assert run("no-such-program-at-all") == (127, "")
    assert run(sys.executable, "-c", "import sys; print('x', file=sys.stderr); sys.exit(3)") == (3, "x")


def test_the_kernels_that_numpy_runs():
    pytest.importorskip("threadpoolctl")
    assert all(library.library for library in blas())
