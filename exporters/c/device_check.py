"""Check an export on the device that will run it. It needs Python 3.8 or newer and a C compiler; nothing else.

    python verify.py                                                the first of $CC, cc, gcc, clang
    python verify.py --compiler clang --flags="-std=c99 -Os"        the compiler and flags that you will use

Without Python: cc -std=c99 -O3 -march=native check.c model.c -o check -lm && ./check

Exit status: 0 if the model gives its golden outputs, at batch 1 and with all rows at once; 1 if not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compiler", help="command of a C compiler")
    parser.add_argument("--flags", help="the flags you will compile model.c with [default: those it was verified with]")
    options = parser.parse_args()
    folder = Path(__file__).resolve().parent
    manifest = json.loads((folder / "manifest.json").read_text())
    changed = [name for name, digest in manifest["files"].items() if sha256(folder / name) != digest]
    for name in changed:
        print(f"{name}: missing, or not the file that was exported; copy it again")
    if changed:
        return 1
    names = [options.compiler] if options.compiler else [os.environ.get("CC"), "cc", "gcc", "clang"]
    compiler = next((path for path in map(shutil.which, filter(None, names)) if path), None)
    if compiler is None:
        print(f"no C compiler: looked for {', '.join(filter(None, names))}; install one, or name it with --compiler")
        return 1
    builds = [options.flags] if options.flags else [build["flags"] for build in manifest["builds"]]
    wrong = sum(differs(folder, compiler, flags) for flags in builds)
    print("FAIL" if wrong else "PASS")
    return 1 if wrong else 0


def sha256(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def differs(folder: Path, compiler: str, flags: str) -> bool:
    """Compile check.c and model.c, and run them. Return True if that fails."""
    with tempfile.TemporaryDirectory() as scratch:
        program = Path(scratch) / "check"
        sources = [str(folder / name) for name in ("check.c", "model.c")]
        built = subprocess.run([compiler, *flags.split(), *sources, "-o", str(program), "-lm"], check=False)
        if built.returncode:
            print(f"{compiler} {flags}: does not compile it")
            return True
        done = subprocess.run([str(program)], stdout=subprocess.PIPE, text=True, check=False)
    for line in done.stdout.splitlines()[:-1]:
        print(f"{compiler} {flags}: {line}")
    if done.returncode < 0:
        print(f"{compiler} {flags}: ended by signal {-done.returncode}")
    return done.returncode != 0


if __name__ == "__main__":
    sys.exit(main())
