"""Recorded machines, each with exactly what is wrong with it and what to do; and their good twins, with nothing wrong.

The lists of compute capabilities are those that tools/check_sm_lists.py reads out of the real wheels (those of TensorRT
and of Jetson's libraries are assumed).
"""

from dataclasses import replace
from pathlib import Path

import pytest

from edgekit.doctor.checks import judge
from edgekit.doctor.finding import Finding
from edgekit.doctor.stacks import guess
from edgekit.doctor.system import Gpu, Jetson, Library, Provider, System, read
from edgekit.targets.profile import find, names

SYSTEMS = Path(__file__).parent / "systems"
P40 = (
    "pip install onnxruntime-gpu==1.26.0 nvidia-cudnn-cu12==9.10.2.21 'nvidia-cublas-cu12>=12,<12.10' "
    "'nvidia-cuda-runtime-cu12>=12,<12.10' 'nvidia-cuda-nvrtc-cu12>=12,<12.10' 'nvidia-cufft-cu12>=11,<12' "
    "'nvidia-curand-cu12>=10,<11'"
)
BOTH = f"pip uninstall -y onnxruntime onnxruntime-gpu && {P40}"
INSTEAD = f"pip uninstall -y onnxruntime && {P40}"
TENSORRT_8 = "install TensorRT 8.6.1 from NVIDIA's archive (CUDA 11.8, 12.0 or 12.1, cuDNN 8.9)"
ORIN_WHEEL = (
    "Jetson AI Lab's package index, or an own build with CMAKE_CUDA_ARCHITECTURES=87; microsoft/onnxruntime#20503: "
    "none on PyPI"
)
INACTIVE = "CUDAExecutionProvider is available but not active"
CPU_ALONE = "there is a GPU, and this onnxruntime runs on the CPU alone"
RTX_26 = "pip install 'onnxruntime-gpu[cuda,cudnn]==1.26.0'"

# recording: target, exit status, all that is not ok when that target is asked for
RECORDED = {
    "p40-good": ("tesla-p40", 0, []),
    "p40-cudnn-9.28": (
        "tesla-p40",
        1,
        [
            Finding(
                "packages",
                "error",
                "nvidia-cudnn-cu12 9.28.0.42 must not be used on tesla-p40: no code below sm_75; "
                "plain pip installs it beside onnxruntime-gpu[cuda,cudnn]",
                "pip install nvidia-cudnn-cu12==9.10.2.21",
            ),
            Finding(
                "sm_61 code",
                "error",
                "nvidia-cudnn-cu12 9.28.0.42: none in libcudnn_adv.so.9, and 4 more (sm 75 80 86 90 100 120, PTX 120)",
                "pip install nvidia-cudnn-cu12==9.10.2.21",
            ),
            Finding(
                "provider",
                "error",
                f"{INACTIVE}, nothing ran: CUDNN failure 5003: CUDNN_STATUS_EXECUTION_FAILED_CUDART",
                P40,
            ),
            Finding(
                "stack",
                "error",
                "onnxruntime-gpu 1.26 on CUDA 12: nvidia-cudnn-cu12 9.28.0.42 must not be used; "
                "nothing ran on CUDAExecutionProvider",
                P40,
            ),
        ],
    ),
    "p40-onnxruntime-1.31": (
        "tesla-p40",
        1,
        [
            Finding(
                "packages",
                "error",
                "onnxruntime-gpu 1.31.1 must not be used on tesla-p40: built for CUDA 13 and sm_75 upwards",
                "pip install onnxruntime-gpu==1.26.0",
            ),
            Finding(
                "sm_61 code",
                "error",
                "onnxruntime-gpu 1.31.1: none in libonnxruntime_providers_cuda.so (sm 75 80 86 89 90 120)",
                "pip install onnxruntime-gpu==1.26.0",
            ),
            Finding(
                "provider",
                "error",
                f"{INACTIVE}, nothing ran: CUDA error cudaErrorNoKernelImageForDevice: no kernel "
                "image is available for execution on the device",
                P40,
            ),
            Finding(
                "stack",
                "error",
                "onnxruntime-gpu 1.26 on CUDA 12: onnxruntime-gpu 1.31.1 must not be used; nothing ran "
                "on CUDAExecutionProvider",
                P40,
            ),
        ],
    ),
    "p40-tensorrt-8.6": ("tesla-p40", 0, [Finding("provider", "warning", CPU_ALONE, INSTEAD)]),
    "p40-tensorrt-10": (
        "tesla-p40",
        1,
        [
            Finding(
                "packages", "error", "tensorrt 10.3.0 must not be used on tesla-p40: Unsupported SM: 0x601", TENSORRT_8
            ),
            Finding(
                "sm_61 code",
                "error",
                "/opt/TensorRT-10.3.0.26/lib 10.3.0: none in libnvinfer.so.10.3.0 (sm 70 75 80 86 89 90, PTX 90)",
                TENSORRT_8,
            ),
            Finding("provider", "warning", CPU_ALONE, INSTEAD),
            Finding(
                "stack",
                "error",
                "onnxruntime-gpu 1.26 on CUDA 12: not installed: onnxruntime-gpu, nvidia-cudnn-cu12, "
                "nvidia-cublas-cu12, nvidia-cuda-runtime-cu12, nvidia-cuda-nvrtc-cu12, nvidia-cufft-cu12, "
                "nvidia-curand-cu12; onnxruntime has no CUDAExecutionProvider",
                INSTEAD,
            ),
        ],
    ),
    "p40-both-onnxruntimes": (
        "tesla-p40",
        1,
        [
            Finding(
                "packages",
                "error",
                "onnxruntime 1.32.0 and onnxruntime-gpu 1.26.0 cannot work together: both install "
                "the folder onnxruntime/: the later one overwrites the earlier, removing either breaks both",
                BOTH,
            ),
            Finding("provider", "warning", CPU_ALONE, BOTH),
            Finding(
                "stack", "error", "onnxruntime-gpu 1.26 on CUDA 12: onnxruntime has no CUDAExecutionProvider", BOTH
            ),
        ],
    ),
    "p40-no-driver": (
        "tesla-p40",
        1,
        [
            Finding(
                "GPU",
                "error",
                "1 NVIDIA GPU on the bus, but no driver shows it",
                "install NVIDIA's driver of a branch >=525,<=580; then nvidia-smi lists it",
            ),
            Finding(
                "stack",
                "error",
                "onnxruntime-gpu 1.26 on CUDA 12: not installed: onnxruntime-gpu, nvidia-cudnn-cu12, "
                "nvidia-cublas-cu12, nvidia-cuda-runtime-cu12, nvidia-cuda-nvrtc-cu12, nvidia-cufft-cu12, "
                "nvidia-curand-cu12; onnxruntime has no CUDAExecutionProvider",
                INSTEAD,
            ),
        ],
    ),
    "rtx-3060-good": ("rtx-3060-12gb", 0, []),
    "rtx-3060-driver-535": (
        "rtx-3060-12gb",
        1,
        [
            Finding(
                "driver",
                "error",
                "535.183.01 is too old for CUDA 13, which onnxruntime-gpu 1.31.1 needs",
                f"update the driver to 580 or later, or install what fits it: {RTX_26}",
            ),
            Finding(
                "provider",
                "error",
                f"{INACTIVE}, nothing ran: CUDA failure 35: CUDA driver version is insufficient for "
                "CUDA runtime version",
                RTX_26,
            ),
            Finding("stack", "error", "onnxruntime-gpu 1.26 on CUDA 12: nothing ran on CUDAExecutionProvider", RTX_26),
        ],
    ),
    "orin-good": ("jetson-orin-nano-8gb", 0, []),
    "orin-pypi-wheel": (
        "jetson-orin-nano-8gb",
        1,
        [
            Finding(
                "packages",
                "error",
                "onnxruntime-gpu 1.31.1 must not be used on jetson-orin-nano-8gb: the aarch64 wheel "
                "has code for sm_89, 90, 120 and 121, none for sm_87, and wants CUDA 13",
                "pip uninstall -y onnxruntime-gpu",
            ),
            Finding(
                "sm_87 code",
                "error",
                "onnxruntime-gpu 1.31.1: none in libonnxruntime_providers_cuda.so (sm 89 90 120 121)",
                "pip uninstall -y onnxruntime-gpu",
            ),
            Finding(
                "provider",
                "error",
                f"{INACTIVE}, the nodes ran on CPUExecutionProvider: libcublasLt.so.13: cannot open shared object file",
                ORIN_WHEEL,
            ),
        ],
    ),
    "nano-good": (
        "jetson-nano",
        0,
        [
            Finding("provider", "warning", CPU_ALONE, "Jetson Zoo: a wheel for cp36; none on PyPI"),
        ],
    ),
    "nano-python-3.8": (
        "jetson-nano",
        1,
        [
            Finding(
                "Python",
                "error",
                "/usr/bin/python3 is 3.8.0; software of jetson-nano is built for 3.6",
                "keep the system's own Python 3.6 as /usr/bin/python3",
            ),
            Finding("provider", "warning", CPU_ALONE, "Jetson Zoo: a wheel for cp36; none on PyPI"),
            Finding("stack", "error", "JetPack 4.6: TensorRT 8.2: it is for Python 3.6, here is 3.8.0"),
        ],
    ),
    "cpu-avx2": ("x86-avx2", 0, []),
    "cpu-bare": (
        "x86-avx2",
        1,
        [
            Finding(
                "memory",
                "warning",
                "300.0 MB of 67.0 GB free",
                "stop the programs that use most of it: ps aux --sort -rss | head",
            ),
            Finding(
                "compiler",
                "warning",
                "no C compiler: small networks run on onnxruntime instead of as C",
                "apt-get install gcc, or name one in $CC",
            ),
            Finding(
                "stack", "error", "onnxruntime 1.32: not installed: onnxruntime", "pip install onnxruntime==1.32.0"
            ),
        ],
    ),
    "cpu-zen5": (
        "x86-avx512",
        0,
        [
            Finding(
                "BLAS",
                "warning",
                "openblas 0.3.31, kernels for Haswell: AVX2, on a CPU with AVX-512",
                "export OPENBLAS_CORETYPE=SkylakeX (twice as fast on Zen 5, no gain on Zen 4)",
            ),
        ],
    ),
}


def recorded(name: str):
    return read(SYSTEMS / f"{name}.json")


def findings(system, target: str | None, *, asked: bool = True):
    """Return all findings that are not ok."""
    found = judge(system, find(target) if target else None, asked=asked)
    return [check for check in found if check.status != "ok"]


def test_every_recording_is_in_the_table():
    assert {path.stem for path in SYSTEMS.glob("*.json")} == set(RECORDED)


@pytest.mark.parametrize("name", RECORDED)
def test_a_recorded_machine(name, edgekit):
    target, status, expected = RECORDED[name]
    assert findings(recorded(name), target) == expected
    assert edgekit("doctor", "--system", SYSTEMS / f"{name}.json", "--target", target).status == status
    assert status == int(any(check.status == "error" for check in expected))


@pytest.mark.parametrize("name", RECORDED)
def test_the_target_is_recognised(name):
    target = guess(recorded(name), map(find, names()))
    assert target is not None
    assert target.name == ("x86-avx2" if name == "p40-no-driver" else RECORDED[name][0])


def test_a_guessed_target_that_lacks_its_software_is_no_error():
    """No one asked doctor whether this machine runs models on its CPU."""
    assert [check.status for check in findings(recorded("cpu-bare"), "x86-avx2", asked=False)] == ["warning"] * 3
    assert [c.name for c in findings(recorded("p40-no-driver"), "x86-avx2", asked=False)] == ["GPU"]


@pytest.mark.parametrize(
    ("name", "target", "reason"),
    [
        ("cpu-avx2", "tesla-p40", "it has no NVIDIA GPU"),
        ("cpu-avx2", "jetson-nano", "it is x86_64, not aarch64"),
        ("cpu-avx2", "x86-avx512", "its CPU has no avx512f, avx512vl, avx512_vnni, avx512_bf16"),
        ("rtx-3060-good", "tesla-p40", "its GPU is NVIDIA GeForce RTX 3060 (8.6), compute capability 6.1 is wanted"),
        ("orin-good", "jetson-nano", "its device tree says 'NVIDIA Jetson Orin Nano Developer Kit'"),
        ("nano-good", "raspberry-pi-5", "its device tree says 'NVIDIA Jetson Nano Developer Kit'"),
    ],
)
def test_another_machine_gets_one_line(name, target, reason):
    record = f"edgekit doctor --json > there.json; then: edgekit doctor --system there.json --target {target}"
    assert findings(recorded(name), target) == [
        Finding("target", "error", f"this machine is no {target}: {reason}", f"on that machine: {record}")
    ]


def test_a_gpu_that_nobody_described_is_checked_all_the_same():
    system = recorded("p40-cudnn-9.28")
    system = replace(system, gpus=(replace(system.gpus[0], name="Tesla P4"),))
    assert guess(system, map(find, names())) is None
    found = findings(system, None, asked=False)
    assert [(check.name, check.status) for check in found] == [
        ("target", "warning"),
        ("sm_61 code", "error"),
        ("provider", "warning"),
    ]


def test_a_driver_after_the_last_one_for_pascal():
    system = replace(recorded("p40-good"), driver="590.44.01")
    assert findings(system, "tesla-p40")[0] == Finding(
        "driver",
        "error",
        "590.44.01 has no support for compute capability 6.1",
        "install branch 580, the last one that supports it",
    )


def test_a_driver_that_does_not_answer():
    system = replace(recorded("p40-good"), gpus=(), driver="", driver_problem="Driver/library version mismatch")
    assert findings(system, "tesla-p40")[0].finding == "the driver's tools fail: Driver/library version mismatch"


def test_a_library_that_the_loader_does_not_find():
    system = recorded("p40-good")
    library = replace(system.libraries[0], missing=("libcufft.so.11", "libcudnn.so.9"))
    found = findings(replace(system, libraries=(library,)), "tesla-p40")
    finding = "libonnxruntime_providers_cuda.so needs libcufft.so.11, libcudnn.so.9, which the loader does not find"
    pip = "pip install nvidia-cudnn-cu12==9.10.2.21 'nvidia-cufft-cu12>=11,<12'"
    assert found == [Finding("libraries", "error", finding, pip)]
    tensorrt = replace(library, missing=("libnvinfer.so.10",))  # TensorRT is optional
    (check,) = findings(replace(system, libraries=(tensorrt,)), "tesla-p40")
    assert (check.name, check.status) == ("libraries", "warning")


def test_a_damaged_library():
    system = recorded("p40-good")
    broken = replace(system.libraries[0], sms=(), ptx=(), problem="libx.so: damaged")
    assert findings(replace(system, libraries=(broken,)), "tesla-p40") == [
        Finding("GPU code", "error", "libx.so: damaged", "pip install onnxruntime-gpu==1.26.0")
    ]


def test_a_provider_that_runs_only_after_preloading():
    system = recorded("p40-good")
    late = Provider("CUDAExecutionProvider", ("CUDAExecutionProvider",), preloaded=True)
    (check,) = findings(replace(system, providers=(late, system.providers[1])), "tesla-p40")
    assert (check.status, check.finding) == (
        "warning",
        "CUDAExecutionProvider runs, but only after onnxruntime.preload_dlls()",
    )


def test_a_half_placed_network_is_not_active():
    assert not Provider("CUDAExecutionProvider", ("CPUExecutionProvider", "CUDAExecutionProvider")).active
    assert not Provider("CUDAExecutionProvider", ()).active


@pytest.mark.parametrize(
    ("jetson", "expected"),
    [
        (Jetson("36.4.3", "6.2", "7W", "locked"), [("power mode", "7W: 65% of the rates of 15W")]),
        (
            Jetson("36.4.3", "6.2", "15W", "free"),
            [("clocks", "clocks change with the load: a time that is measured now may not be repeatable")],
        ),
        (
            Jetson("36.4.3", "", "", ""),
            [
                ("power mode", "nvpmodel does not report the power mode"),
                (
                    "clocks",
                    "jetson_clocks reports the clocks only to root: a time that is measured now may not be repeatable",
                ),
            ],
        ),
        (
            Jetson("35.4.1", "", "15W", "locked"),
            [
                ("JetPack", "JetPack 5 (L4T 35.4.1); jetson-orin-nano-8gb needs 6.1 or 6.2"),
                ("stack", "JetPack 6: TensorRT 10.3: it is for JetPack 6.1 or 6.2, here is 5"),
            ],
        ),
    ],
)
def test_a_jetsons_image_and_clocks(jetson, expected):
    found = findings(replace(recorded("orin-good"), jetson=jetson), "jetson-orin-nano-8gb")
    assert [(check.name, check.finding) for check in found] == expected


def test_another_version_than_the_pinned_one_is_named():
    system = recorded("cpu-avx2")
    system = replace(system, packages={**system.packages, "onnxruntime": "1.30.0"})
    lines = [check.finding for check in judge(system, find("x86-avx2"), asked=True) if check.name == "stack"]
    assert lines == [
        "onnxruntime 1.32: complete, with onnxruntime 1.30.0 instead of ==1.32.0",
        "C, from the exporter: complete",
    ]


def test_only_the_stack_that_is_installed_is_complete():
    """CUDA 12's and CUDA 13's onnxruntime are the same package in two versions."""
    found = judge(recorded("rtx-3060-good"), find("rtx-3060-12gb"), asked=True)
    assert [check.finding for check in found if check.name == "stack"] == ["onnxruntime-gpu 1.31 on CUDA 13: complete"]


def test_a_jetson_with_an_older_minor_release_of_tensorrt_is_not_complete():
    """JetPack 4.6.0 has TensorRT 8.0: build.sh of a kit for 8.2 refuses it, and so does doctor."""
    system = recorded("nano-good")
    old = findings(replace(system, system_libraries={**system.system_libraries, "libnvinfer": "8.0.1"}), "jetson-nano")
    assert [(check.name, check.status) for check in old if check.status == "error"] == [("stack", "error")]
    assert "TensorRT 8.0.1 is installed" in old[-1].finding


def test_a_check_without_teeth_would_be_seen():
    """The planted failures: break one thing in each good machine, and exactly its finding must appear."""
    system = recorded("orin-good")
    bad = replace(system.libraries[2], sms=(86,))  # desktop Ampere beside Orin
    found = findings(replace(system, libraries=(*system.libraries[:2], bad)), "jetson-orin-nano-8gb")
    assert [(check.name, check.status) for check in found] == [("sm_87 code", "error")]
    system = recorded("rtx-3060-good")
    found = findings(replace(system, providers=(replace(system.providers[0], ran=()),)), "rtx-3060-12gb")
    assert [(check.name, check.status) for check in found] == [("provider", "error"), ("stack", "error")]


def test_two_onnxruntimes_on_a_machine_that_no_profile_describes():
    """Then doctor knows only the remedy of the rule itself."""
    system = recorded("p40-both-onnxruntimes")
    system = replace(system, gpus=(replace(system.gpus[0], name="Tesla P4"),))
    found = next(check for check in findings(system, None, asked=False) if check.name == "packages")
    assert found.remedy.startswith("pip uninstall -y onnxruntime onnxruntime-gpu, then install the one you need")
    system = recorded("cpu-avx2")
    system = replace(system, packages={**system.packages, "onnxruntime-gpu": "1.31.1"})
    (found,) = findings(system, "x86-avx2")
    assert found.remedy == "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime==1.32.0"


def test_two_cards_of_different_compute_capability():
    system = recorded("p40-good")
    other = Gpu("NVIDIA GeForce RTX 3060", "8.6", 12_880_000_000, 12_000_000_000)
    found = judge(replace(system, gpus=(other, *system.gpus)), find("tesla-p40"), asked=True)
    assert [check.finding for check in found if check.name == "GPU"] == [
        "Tesla P40, compute capability 6.1, 23.5 GB of 24.0 GB free",
        "NVIDIA GeForce RTX 3060, compute capability 8.6, 12.0 GB of 12.9 GB free; "
        "the checks below are about the Tesla P40",
    ]
    assert {check.name for check in found} >= {"sm_61 code"}
    assert all(check.status == "ok" for check in found)


def test_a_jetsons_driver_is_not_judged_as_a_desktops():
    """JetPack 6's nvidia-smi says 540, and its GPU has no memory of its own."""
    system = replace(recorded("orin-good"), driver="540.4.0", gpus=(Gpu("Orin (nvgpu)", "8.7"),))
    assert findings(system, "jetson-orin-nano-8gb") == []


def test_cards_of_one_name_are_told_apart_by_their_memory():
    system = recorded("rtx-3060-good")
    for memory, name in ((12_880_000_000, "rtx-3060-12gb"), (8_590_000_000, "rtx-3060-8gb")):
        found = guess(replace(system, gpus=(replace(system.gpus[0], memory=memory),)), map(find, names()))
        assert found is not None
        assert found.name == name
    laptop = replace(system, gpus=(replace(system.gpus[0], name="NVIDIA GeForce RTX 3060 Ti"),))
    assert guess(laptop, map(find, names())) is None


def test_the_hint_for_openblas_is_not_repeated_to_who_followed_it():
    system = recorded("cpu-zen5")
    assert findings(replace(system, environment={"OPENBLAS_CORETYPE": "SkylakeX"}), "x86-avx512") == []


def test_an_onnxruntime_that_is_not_there_is_not_said_to_run_on_the_cpu():
    system = replace(recorded("p40-good"), providers=(), packages={})
    assert [check.name for check in findings(system, "tesla-p40")] == ["stack"]


def test_the_build_of_llama_cpp_is_named_with_its_gpus():
    def said(**facts):
        found = judge(System(machine="x86_64", **facts), None, asked=False)
        return [check.finding for check in found if check.name == "llama.cpp"]

    assert said() == []
    assert said(llama_cpp="xllamacpp 2026.10.1") == ["xllamacpp 2026.10.1; for the CPU alone"]
    library = Library("libggml-cuda.so", "llama.cpp", sms=(86,), ptx=(61,))
    assert said(llama_cpp="/opt/llama", libraries=(library,)) == ["/opt/llama; GPU code: sm 86, PTX 61"]
