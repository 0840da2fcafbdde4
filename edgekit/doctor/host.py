"""Check the machine itself, whatever runs on it: memory, CPU instructions, BLAS, compiler."""

from __future__ import annotations

from collections.abc import Iterator

from edgekit.doctor.finding import Finding, size
from edgekit.doctor.system import System

FEW = 512 << 20  # bytes of free memory; with less, few programs can start
X86 = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16", "amx_int8")
ARM = ("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve")


def memory(system: System) -> Iterator[Finding]:
    if not system.memory:
        return
    shared = ", shared with the GPU" if system.jetson else ""
    finding = f"{size(system.available)} of {size(system.memory)} free{shared}"
    if system.available < max(FEW, system.memory / 10):
        desktop = "; to stop the desktop: sudo systemctl isolate multi-user.target" if system.jetson else ""
        yield Finding(
            "memory", "warning", finding, f"stop the programs that use most of it: ps aux --sort -rss | head{desktop}"
        )
    else:
        yield Finding("memory", "ok", finding)


def cpu(system: System) -> Iterator[Finding]:
    flags = [flag for flag in (*X86, *ARM) if flag in system.cpu.flags]
    finding = ", ".join(flags) or "no vector instructions that edgekit knows"
    if system.machine == "x86_64" and system.cpu.flags and "avx2" not in flags:
        yield Finding("CPU", "warning", f"{finding}; without AVX2 runtimes fall back to 128-bit kernels", "")
    elif "avx2" in flags and not {"avx512_vnni", "avx_vnni"} & set(flags):
        yield Finding(
            "CPU", "ok", f"{finding}; no VNNI: int8 products of the scheme u8s8 saturate, so weights need 7 bits"
        )
    elif system.cpu.flags:
        yield Finding("CPU", "ok", finding)
    for library in system.blas:
        slow = library.library == "openblas" and library.kernel in ("Haswell", "Zen") and "avx512f" in flags
        finding = f"{library.library} {library.version}, kernels for {library.kernel}"
        if slow and "OPENBLAS_CORETYPE" not in system.environment:
            yield Finding(
                "BLAS",
                "warning",
                f"{finding}: AVX2, on a CPU with AVX-512",
                "export OPENBLAS_CORETYPE=SkylakeX (twice as fast on Zen 5, no gain on Zen 4)",
            )
        else:
            yield Finding("BLAS", "ok", finding)


def compiler(system: System) -> Iterator[Finding]:
    if system.compiler:
        yield Finding("compiler", "ok", system.compiler)
    else:
        yield Finding(
            "compiler",
            "warning",
            "no C compiler: small networks run on onnxruntime instead of as C",
            "apt-get install gcc, or name one in $CC",
        )
