"""Print for which GPUs the libraries in wheels, or .so files, contain code.

    python tools/check_sm_lists.py onnxruntime_gpu-1.26.0-*.whl --sm 61

With --sm, the exit status is 1 unless every library that has GPU code runs on that compute capability.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from edgekit.doctor.fatbin import Code, read
from edgekit.errors import EdgekitError

LIBRARY = re.compile(r"\.so(\.\d+)*$")


def libraries(path: Path, scratch: Path) -> Iterator[Path]:
    """Yield the shared libraries of a wheel, one at a time because they can have gigabytes, or the file itself."""
    if path.suffix != ".whl":
        yield path
        return
    with zipfile.ZipFile(path) as wheel:
        for name in sorted(filter(LIBRARY.search, wheel.namelist())):
            file = Path(wheel.extract(name, scratch))
            yield file
            file.unlink()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, help="wheels or shared libraries")
    parser.add_argument("--sm", type=int, help="compute capability that they must run on, such as 61")
    options = parser.parse_args()
    missing = 0
    for file in options.files:
        print(file.name)
        sms: set[int] = set()
        ptx: set[int] = set()
        with tempfile.TemporaryDirectory() as scratch:
            for library in libraries(file, Path(scratch)):
                try:
                    code = read(library)
                except EdgekitError as error:
                    print(f"edgekit: {error}", file=sys.stderr)
                    return 1
                if not code:
                    continue
                wrong = options.sm is not None and not code.runs_on(options.sm)
                missing += wrong
                print(f"  {library.name:45} {code}{f'  NOT FOR sm_{options.sm}' if wrong else ''}")
                sms, ptx = sms | set(code.sms), ptx | set(code.ptx)
        print(f"  {'all':45} {Code(tuple(sorted(sms)), tuple(sorted(ptx)))}")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
