"""Find what is wrong with a machine and how to fix it: pure functions of the observed system and a target's profile."""

from __future__ import annotations

import re
from collections.abc import Iterator

from edgekit.doctor import host
from edgekit.doctor.extras import conflicts
from edgekit.doctor.finding import Finding, Status, size
from edgekit.doctor.providers import CPU
from edgekit.doctor.stacks import (
    RUNTIMES,
    branch,
    differing,
    fitting,
    forbidden,
    install,
    jetpack,
    lacking,
    names,
    packages_of,
    pins,
    python_of,
    remedy,
    unfit,
    within,
)
from edgekit.doctor.system import Gpu, Library, System
from edgekit.targets.profile import Target

# the oldest driver branch that runs programs of a CUDA version (CUDA release notes, minor version compatibility)
DRIVERS = {11: 450, 12: 525, 13: 580}
LAST_DRIVER = 580  # branch for GPUs before Turing (7.5): NVIDIA's notice of the end of Maxwell, Pascal and Volta
TURING = 75
SHOWN = re.compile(r"(onnxruntime|openvino$|tensorrt|torch$|numpy$)")
PACKAGE_OF = {  # the package that contains a CUDA library, by the start of the library's name; %s is the CUDA version
    "libcublas": "nvidia-cublas-cu%s", "libcudart": "nvidia-cuda-runtime-cu%s", "libcudnn": "nvidia-cudnn-cu%s",
    "libcufft": "nvidia-cufft-cu%s", "libcurand": "nvidia-curand-cu%s", "libnvrtc": "nvidia-cuda-nvrtc-cu%s",
}  # fmt: skip


def judge(system: System, target: Target | None, *, asked: bool) -> list[Finding]:
    """Run all checks. asked: the user named the target, so a missing part is an error; for a guessed target it is a
    warning."""
    if target and asked and (reason := _stranger(system, target)):
        record = f"edgekit doctor --json > there.json; then: edgekit doctor --system there.json --target {target.name}"
        return [Finding("target", "error", f"this machine is no {target.name}: {reason}", f"on that machine: {record}")]
    missing: Status = "error" if asked else "warning"
    found = [*_target(system, target, asked), *_gpu(system, target, asked), *_driver(system, target)]
    found += [*_jetson(system, target), *_python(system, target), *_packages(system, target), *_cuda(system, target)]
    found += [*_llama_cpp(system), *_code(system, target), *_missing(system, target), *_providers(system, target)]
    found += [*_tensorrt(system, target), *host.memory(system), *host.cpu(system), *host.compiler(system)]
    return [*found, *_stacks(system, target, missing)]


def _stranger(system: System, target: Target) -> str:
    """Say why this machine cannot be the target, whatever is installed on it; "" if it can."""
    if target.machine != system.machine:
        return f"it is {system.machine}, not {target.machine}"
    if target.device_tree and not set(target.device_tree) & set(system.device_tree):
        return f"its device tree says {system.device_tree[0]!r}" if system.device_tree else "it has no device tree"
    if target.kind == "cpu":
        lost = [flag for flag in target.features if flag not in system.cpu.flags]
        return f"its CPU has no {', '.join(lost)}" if lost else ""
    if target.kind == "jetson" or system.driver_problem:
        return ""
    if not system.gpus:
        return "" if system.pci_gpus else "it has no NVIDIA GPU"
    capabilities = {gpu.compute_capability: gpu.name for gpu in system.gpus}
    if target.compute_capability in capabilities or "" in capabilities:
        return ""
    shown = ", ".join(f"{name} ({capability})" for capability, name in capabilities.items())
    return f"its GPU is {shown}, compute capability {target.compute_capability} is wanted"


def gpu_of(system: System, target: Target | None) -> Gpu | None:
    """Return the GPU that the checks are about: the one that matches the target, otherwise the first."""
    if target and target.kind == "cpu":
        return None
    same = [gpu for gpu in system.gpus if target and gpu.compute_capability == target.compute_capability]
    return next(iter(same or system.gpus), None)


def sm_of(system: System, target: Target | None) -> int | None:
    """Return the compute capability of this machine's GPU, 61 for 6.1. For a Jetson, the board determines it."""
    gpu = gpu_of(system, target)
    if gpu and gpu.sm:
        return gpu.sm
    named = bool(gpu) or system.jetson is not None
    return target.sm if target and target.kind != "cpu" and named else None


def _target(system: System, target: Target | None, asked: bool) -> Iterator[Finding]:
    board = f"{system.device_tree[0]}: " if system.device_tree else ""
    cores = f"{system.cpu.cores} core{'s' * (system.cpu.cores > 1)}"
    finding = f"{board}{system.cpu.name or system.machine}, {cores}, {system.os} on {system.machine}"
    if system.os == "Linux":
        yield Finding("machine", "ok", finding)
    else:
        yield Finding("machine", "warning", finding, "edgekit is tested only on Linux")
    if target is None:
        yield Finding(
            "target",
            "warning",
            "no profile describes this machine; edgekit checks it without one",
            "see edgekit targets, or describe it in a file: edgekit doctor --target FILE.toml",
        )
        return
    plan = f"use {', '.join(target.plan.order)}" + f"; never {', '.join(target.plan.never)}" * bool(target.plan.never)
    yield Finding("target", "ok", f"{target.name}{'' if asked else ', recognised'}: {plan}")


def _gpu(system: System, target: Target | None, asked: bool) -> Iterator[Finding]:
    if target and (target.kind == "jetson" or (target.kind == "cpu" and asked)):
        return
    unusable: Status = "warning" if target and target.kind == "cpu" else "error"
    if system.driver_problem:
        yield Finding(
            "GPU",
            unusable,
            f"the driver's tools fail: {system.driver_problem}",
            "after an update of the driver: reboot; else install the driver again",
        )
    elif not system.gpus and system.pci_gpus:
        branches = f" of a branch {target.stack.driver}" if target and target.stack.driver else ""
        yield Finding(
            "GPU",
            unusable,
            f"{_many(system.pci_gpus, 'NVIDIA GPU')} on the bus, but no driver shows it",
            f"install NVIDIA's driver{branches}; then nvidia-smi lists it",
        )
    chosen = gpu_of(system, target)
    if chosen is None:
        return
    for gpu in sorted(system.gpus, key=lambda gpu: gpu is not chosen):
        memory = f"{size(gpu.free)} of {size(gpu.memory)} free"
        finding = f"{gpu.name}, compute capability {gpu.compute_capability or 'not told'}, {memory}"
        if gpu is not chosen and gpu.compute_capability != chosen.compute_capability:
            finding += f"; the checks below are about the {chosen.name}"
        if gpu.free < gpu.memory / 5:
            yield Finding("GPU", "warning", finding, "see which programs use its memory: nvidia-smi")
        else:
            yield Finding("GPU", "ok", finding)


def _driver(system: System, target: Target | None) -> Iterator[Finding]:
    if not system.driver or system.jetson or (target and target.kind == "cpu"):
        return  # the driver of a Jetson is part of its JetPack
    found, sm = branch(system.driver), sm_of(system, target)
    finding = f"{system.driver}{f', CUDA up to {system.cuda}' * bool(system.cuda)}"
    possible = [s for s in target.stacks if not s.driver or within(str(found), s.driver)] if target else []
    pip = next((install(stack.requirements) for stack in possible if stack.requirements), "")
    other = f", or install what fits it: {pip}" if pip else ""
    checks = []
    for cuda, users in sorted(_cuda_versions(system).items()):
        least = DRIVERS.get(cuda, 0)
        if found < least:
            checks.append(
                Finding(
                    "driver",
                    "error",
                    f"{system.driver} is too old for CUDA {cuda}, which {', '.join(sorted(users))} needs",
                    f"update the driver to {least} or later{other}",
                )
            )
    if sm and sm < TURING and found > LAST_DRIVER:
        checks.append(
            Finding(
                "driver",
                "error",
                f"{system.driver} has no support for compute capability {sm / 10}",
                f"install branch {LAST_DRIVER}, the last one that supports it",
            )
        )
    elif target and not possible and not checks:
        ranges = " or ".join(dict.fromkeys(stack.driver for stack in target.stacks))
        checks.append(
            Finding(
                "driver",
                "error",
                f"{system.driver}; {target.name} needs {ranges}",
                f"install a driver of a branch {ranges}",
            )
        )
    yield from checks or [Finding("driver", "ok", finding)]


def _cuda_versions(system: System) -> dict[int, set[str]]:
    """Return the CUDA versions that installed libraries are linked to, each with the packages of these libraries."""
    found: dict[int, set[str]] = {}
    for library in system.libraries:
        for name in library.needed:
            if linked := re.fullmatch(r"lib(?:cudart|cublas|cublasLt)\.so\.(\d+)", name):
                found.setdefault(int(linked[1]), set()).add(f"{library.package} {library.version}".strip())
    return found


def _jetson(system: System, target: Target | None) -> Iterator[Finding]:
    if system.jetson is None or (target and target.kind != "jetson"):
        return
    image, release = system.jetson, jetpack(system)
    finding = f"JetPack {release or 'unknown'} (L4T {image.l4t})"
    wanted = list(dict.fromkeys(stack.jetpack for stack in target.stacks if stack.jetpack)) if target else []
    if wanted and not any(text.partition(".")[0] == release.partition(".")[0] for text in wanted):
        yield Finding(
            "JetPack",
            "error",
            f"{finding}; {target.name if target else ''} needs {' or '.join(wanted)}",
            f"flash JetPack {wanted[0]}",
        )
    else:
        yield Finding("JetPack", "ok", finding)
    modes = target.power if target else ()
    full = next((mode for mode in modes if mode.share == 1), None)
    mode = next((item for item in modes if item.name == image.mode), None)
    if not image.mode:
        yield Finding(
            "power mode",
            "warning",
            "nvpmodel does not report the power mode",
            "run edgekit doctor as root, or: nvpmodel -q",
        )
    elif mode and full and mode is not full:
        yield Finding(
            "power mode",
            "warning",
            f"{mode.name}: {mode.share:.0%} of the rates of {full.name}",
            f"sudo nvpmodel -m ID, with the ID of {full.name} in /etc/nvpmodel.conf",
        )
    else:
        yield Finding("power mode", "ok", image.mode)
    if image.clocks != "locked":
        told = "clocks change with the load" if image.clocks else "jetson_clocks reports the clocks only to root"
        yield Finding(
            "clocks",
            "warning",
            f"{told}: a time that is measured now may not be repeatable",
            "before measuring: sudo jetson_clocks",
        )
    else:
        yield Finding("clocks", "ok", "locked by jetson_clocks")


def _python(system: System, target: Target | None) -> Iterator[Finding]:
    if target is None or not (python := python_of(system, target)):
        return
    where = "/usr/bin/python3" if target.kind == "jetson" else "Python"
    wanted = list(dict.fromkeys(stack.python for stack in target.stacks if stack.python))
    if wanted and not any(within(python, text) for text in wanted):
        every = " or ".join(wanted)
        fix = (
            f"keep the system's own Python {every} as /usr/bin/python3"
            if target.kind == "jetson"
            else f"make an environment with Python {every}"
        )
        yield Finding("Python", "error", f"{where} is {python}; software of {target.name} is built for {every}", fix)
    else:
        yield Finding("Python", "ok", f"{where} is {python}")


def _packages(system: System, target: Target | None) -> Iterator[Finding]:
    installed = names(system)
    clashes = conflicts(installed)
    for clash in clashes:
        finding = f"{' and '.join(clash.packages)} cannot work together: {clash.why}"
        twins = {text.partition(" ")[0] for text in clash.packages} == set(RUNTIMES)
        pinned = [s for s in fitting(system, target) if set(packages_of(s)) & set(RUNTIMES)] if twins else []
        yield Finding("packages", "error", finding, remedy(system, pinned[0]) if pinned else clash.remedy)
    banned = forbidden(target, installed) if target else []
    for name, version, rule in banned:
        finding = f"{name} {version} must not be used on {target.name if target else ''}: {rule.why}"
        yield Finding("packages", "error", finding, _replace(system, target, name))
    if not clashes and not banned:
        shown = [f"{name} {version}" for name, version in sorted(system.packages.items()) if SHOWN.match(name)]
        every = f"{_many(len(system.packages), 'package')}, none of them exclude one another"
        yield Finding("packages", "ok", f"{', '.join(shown)}; {every}" if shown else every)


def _replace(system: System, target: Target | None, package: str, library: str = "") -> str:
    """Say how to install the right version of a package, or how to remove the package."""
    if found := pins(system, target, [package]):
        return found
    if package in system.packages:
        return f"pip uninstall -y {package}"
    stacks = fitting(system, target)
    if package == "tensorrt" or library.startswith("libnvinfer"):
        return next((remedy(system, stack) for stack in stacks if stack.runtime == "tensorrt"), f"remove {package}")
    if library.startswith("libcudnn") and (number := next((stack.cudnn for stack in stacks if stack.cudnn), "")):
        return f"install cuDNN {number} in its place"
    return f"remove {package}"


def _getting(system: System, target: Target | None, provider: str) -> str:
    """Say how to install an onnxruntime provider that works on this machine."""
    line = next((remedy(system, stack) for stack in fitting(system, target) if stack.provider == provider), "")
    return line or "pip install 'edgekit[gpu]'"


def _cuda(system: System, target: Target | None) -> Iterator[Finding]:
    """Report the installed CUDA and cuDNN, whether they came with pip or with the system."""
    if target and target.kind == "cpu":
        return
    versions = [f"CUDA {number} ({', '.join(sorted(users))})" for number, users in _cuda_versions(system).items()]
    compiler = [f"nvcc {system.nvcc}"] if system.nvcc else []
    if versions or compiler:
        yield Finding("CUDA", "ok", ", ".join([*versions, *compiler]))
    known = {f"{name} {version}" for name, version in system.packages.items() if name.startswith("nvidia-cudnn")}
    known |= {f"{version} of the system" for name, version in system.system_libraries.items() if name == "libcudnn"}
    if known:
        yield Finding("cuDNN", "ok", ", ".join(sorted(known)))


def _llama_cpp(system: System) -> Iterator[Finding]:
    """Say which llama.cpp runs language models, and whether it has code for GPUs."""
    if not system.llama_cpp:
        return
    packages = ("llama.cpp", "xllamacpp")
    codes = [str(library.code) for library in system.libraries if library.package in packages and library.code]
    yield Finding("llama.cpp", "ok", f"{system.llama_cpp}; {f'GPU code: {codes[0]}' if codes else 'for the CPU alone'}")


def _code(system: System, target: Target | None) -> Iterator[Finding]:
    """Say for which GPUs the installed libraries have code, package by package."""
    if target and target.kind == "cpu":
        return
    sm = sm_of(system, target)
    packages: dict[str, list[Library]] = {}
    for library in system.libraries:
        if library.problem:
            yield Finding("GPU code", "error", library.problem, _replace(system, target, library.package, library.name))
        elif library.code:
            packages.setdefault(f"{library.package} {library.version}".strip(), []).append(library)
    for title, libraries in packages.items():
        name = "GPU code" if sm is None else f"sm_{sm} code"
        wrong = [library for library in libraries if sm is not None and not library.code.runs_on(sm)]
        if wrong:
            more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            yield Finding(
                name,
                "error",
                f"{title}: none in {wrong[0].name}{more} ({wrong[0].code})",
                _replace(system, target, wrong[0].package, wrong[0].name),
            )
        else:
            least = min(libraries, key=lambda library: len(library.sms))
            yield Finding(name, "ok", f"{title}: {least.code}")


def _missing(system: System, target: Target | None) -> Iterator[Finding]:
    """Report libraries that installed libraries need and that the loader does not find."""
    sm = sm_of(system, target)
    banned = {name for name, _, _ in forbidden(target, names(system))} if target else set()
    for library in system.libraries:
        if not library.missing or (target and target.kind == "cpu"):
            continue
        if library.package in banned or (sm and library.code and not library.code.runs_on(sm)):
            continue  # another finding already says that this library must be replaced
        finding = f"{library.name} needs {', '.join(library.missing)}, which the loader does not find"
        if any(name.startswith(("libnvinfer", "libnvonnx")) for name in library.missing):
            yield Finding(
                "libraries",
                "warning",
                f"{finding}: there is no TensorrtExecutionProvider",
                f"only if you want it: install the TensorRT that brings {library.missing[0]}",
            )
            continue
        cuda = max(_cuda_versions(system), default=12)
        wanted = [
            package % cuda
            for stem, package in PACKAGE_OF.items()
            if any(name.startswith(stem) for name in library.missing)
        ]
        yield Finding("libraries", "error", finding, pins(system, target, wanted) or install(wanted or library.missing))


def _providers(system: System, target: Target | None) -> Iterator[Finding]:
    if system.providers_problem:
        again = pins(system, target, ["onnxruntime-gpu", "onnxruntime"]) or "pip install --force-reinstall onnxruntime"
        yield Finding("onnxruntime", "error", f"it cannot be imported: {system.providers_problem}", again)
        return
    wanted = {stack.provider for stack in target.stacks} if target else set()
    for provider in system.providers:
        if target and target.kind == "cpu" and provider.name != CPU:
            continue
        if provider.active and not provider.preloaded:
            yield Finding("provider", "ok", f"{provider.name} really ran a convolution and a product")
        elif provider.active:
            yield Finding(
                "provider",
                "warning",
                f"{provider.name} runs, but only after onnxruntime.preload_dlls()",
                "call that first, or name site-packages' folders nvidia/*/lib in LD_LIBRARY_PATH",
            )
        else:
            ran = f"the nodes ran on {', '.join(provider.ran)}" if provider.ran else "nothing ran"
            why = f": {provider.problem}" if provider.problem else ""
            yield Finding(
                "provider",
                "error" if provider.name in wanted else "warning",
                f"{provider.name} is available but not active, {ran}{why}",
                _getting(system, target, provider.name)
                if provider.name in wanted
                else "do not ask for it, or install what it needs",
            )
    gpu = system.gpus or system.jetson
    if system.providers and gpu and all(item.name == CPU for item in system.providers) and sm_of(system, target):
        yield Finding(
            "provider",
            "warning",
            "there is a GPU, and this onnxruntime runs on the CPU alone",
            _getting(system, target, "CUDAExecutionProvider"),
        )


def _tensorrt(system: System, target: Target | None) -> Iterator[Finding]:
    if target and target.kind == "cpu":
        return
    if system.tensorrt:
        tool = f", {system.trtexec}" if system.trtexec else ", no trtexec"
        yield Finding("TensorRT", "ok", f"{system.tensorrt}{tool}")
    if target and target.kind == "jetson" and not system.trtexec:
        yield Finding(
            "TensorRT",
            "warning",
            "there is no trtexec, which builds engines here",
            "sudo apt-get install libnvinfer-bin; it lands in /usr/src/tensorrt/bin",
        )


def _stacks(system: System, target: Target | None, missing: Status) -> Iterator[Finding]:
    """Whether one of the target's stacks is complete."""
    if target is None:
        return
    problems = {s: (unfit(system, target, s), lacking(system, target, s)) for s in target.stacks}
    working = [stack for stack in target.stacks if problems[stack] == ([], [])]
    pinned = {name for stack in working if not differing(system, stack) for name in packages_of(stack)}
    for stack in working:
        other = ", ".join(differing(system, stack))
        if other and pinned & set(packages_of(stack)):
            continue  # what is installed is another of the target's stacks
        yield Finding("stack", "ok", f"{stack.name}: complete{f', with {other}' if other else ''}")
    if not working:
        best = next((stack for stack in target.stacks if not problems[stack][0]), target.stack)
        blocked, lost = problems[best]
        yield Finding(
            "stack", missing, f"{best.name}: {'; '.join([*blocked, *lost])}", "" if blocked else remedy(system, best)
        )


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"
