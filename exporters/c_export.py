"""Export a bundle to C: one C99 file that holds the weights and needs only libm, compared with its source network.

model.c, model.h    the network; the header documents its interface
check.c             golden rows, and a program that compares model.c with them
golden.npz          the same rows as arrays
verify.py           compiles and runs check.c on the device; it needs Python and a C compiler only
manifest.json       SHA-256 of every file, compilers, tolerance, measured differences

The code computes one sample at a time in a workspace of some hundred kilobytes, which stays in a core's L2 cache.
Runtimes that run each operator on a whole batch stream the activations through memory. The code computes softmax in
registers.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from edgekit import __version__
from edgekit.bundle.format import GOLDEN, KEY, Bundle, model_key
from edgekit.bundle.tensors import Arrays
from edgekit.errors import EdgekitError
from edgekit.exporter import Export, Exporter
from edgekit.graph.lower import lower
from exporters.base import MANIFEST, check_destination, publish
from exporters.c.library import NATIVE, PLAIN, Compiler, Library
from exporters.c.program import Program, program
from exporters.c.source import FOLDER, CSource, write_check, write_source
from exporters.damage import check_golden
from exporters.verify import BATCHES, CALLS, TOLERANCE, Check, Reference, compare, reference, repeated

MODEL, HEADER, CHECK = "model.c", "model.h", "check.c"


@dataclass(frozen=True, slots=True)
class CExporter(Exporter):
    """Parameters of a C export."""

    # encoded: store the codes that compression passes produced. Each call decodes them into the caller's workspace: the
    # model takes several times less flash, and one row per call is a few per cent slower.
    weights: Literal["float32", "encoded"] = "float32"

    def __post_init__(self) -> None:
        if self.weights not in ("encoded", "float32"):
            raise EdgekitError(f"C weights = {self.weights!r}; expected 'encoded' or 'float32'")

    def export(self, bundle: Bundle, directory: str | Path, *, force: bool = False) -> Export:
        """Write sources, golden data, device check and manifest if the compiled model's outputs agree with the
        network's.

        Raises, and writes nothing, if there is no C compiler, if the C exporter does not support the bundle's family,
        or if an output is beyond tolerance at any batch size. It tests two builds: with this machine's instructions and
        with the architecture's baseline.
        """
        directory = Path(directory)
        check_destination(directory, force=force)
        compiler = Compiler()
        network = program(bundle)
        source = self._write(bundle, network)
        expected = reference(bundle)
        allowed = max(TOLERANCE, 2 * expected.noise)
        golden = check_golden(lower(bundle, weights="float32"), bundle, allowed, allowed)
        checks, builds = [], []
        for flags in (NATIVE, PLAIN):
            library = compiler.shared_library(source.model, source.header, flags)
            found, lanes = _verify(library, bundle, expected, allowed)
            checks += found
            size = compiler.object_size(source.model, source.header, flags)
            builds.append({"flags": " ".join(flags), "lanes": lanes, "object_bytes": size})
        records = [asdict(check) for check in checks]
        inputs, outputs = bundle.golden()
        files = {
            MODEL: source.model.encode(),
            HEADER: source.header.encode(),
            CHECK: write_check(network, inputs, outputs, allowed).encode(),
            GOLDEN: bundle.contents[GOLDEN],
            "verify.py": (FOLDER / "device_check.py").read_bytes(),
        }
        manifest = {
            "format": "edgekit-c-1",
            "model": bundle.manifest.name,
            "bundle": bundle.digest,
            KEY: model_key(bundle),
            "weights": self.weights,
            "workspace_bytes": 4 * source.workspace,
            "inputs": {spec.name: {"shape": spec.shape, "dtype": spec.dtype} for spec in bundle.manifest.inputs},
            "outputs": {spec.name: {"shape": spec.shape, "dtype": spec.dtype} for spec in bundle.manifest.outputs},
            "classes": bundle.manifest.classes,
            "preprocessing": bundle.manifest.preprocessing,
            "tolerance": allowed,
            "builds": builds,
            "checks": records,
            **golden,
            "versions": {
                "edgekit": __version__,
                "torch": torch.__version__,
                "numpy": np.__version__,
                "compiler": compiler.version(),
            },
            "files": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
        }
        files[MANIFEST] = (json.dumps(manifest, indent=1, allow_nan=False) + "\n").encode()
        publish(files, directory, force=force)
        return Export(directory, {name: len(content) for name, content in files.items()}, manifest, records)

    def source(self, bundle: Bundle) -> CSource:
        """Return the bundle as C source, which is not yet compiled or verified."""
        return self._write(bundle, program(bundle))

    def _write(self, bundle: Bundle, network: Program) -> CSource:
        encodings = bundle.encodings() if self.weights == "encoded" else {}
        return write_source(network, encodings, bundle.manifest.name, model_key(bundle))


def _verify(library: bytes, bundle: Bundle, expected: Reference, allowed: float) -> tuple[list[Check], int]:
    """Compare a compiled model with the network in float64 at each batch size; raise at the first difference beyond
    tolerance.

    Returns the checks, and the number of floats in a vector of this build.
    """
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "model.so"
        path.write_bytes(library)
        model = Library(path)
    whole = _run(model, bundle, expected.inputs, max(BATCHES), max(BATCHES))
    checks = []
    for batch in BATCHES:
        rows = min(max(BATCHES), batch * CALLS)
        outputs = _run(model, bundle, expected.inputs, batch, rows)
        check = compare(f"{MODEL}, {model.lanes} lanes", library, batch, rows, outputs, whole, expected, allowed)
        _judge(check, bundle.manifest.name)
        checks.append(check)
    return checks, model.lanes


def _run(model: Library, bundle: Bundle, inputs: Arrays, batch: int, rows: int) -> Arrays:
    """Run `rows` rows, `batch` in a call; if there are fewer inputs, they repeat from the start."""
    cycled = [repeated(inputs[spec.name], rows) for spec in bundle.manifest.inputs]
    spec = bundle.manifest.outputs[0]
    output = np.full((rows, *map(int, spec.shape[1:])), np.nan, np.float32)
    workspace = np.empty(model.workspace, np.float32)
    for start in range(0, rows, batch):
        part = slice(start, start + batch)
        model.run(len(output[part]), [*(array[part] for array in cycled), output[part]], workspace)
    return {spec.name: output}


def _judge(check: Check, model: str) -> None:
    found = (check.difference, check.spread, check.golden)
    if all(value <= check.allowed for value in found) and not check.changed:  # NaN is not within tolerance
        return
    raise EdgekitError(
        f"{model}: {check.file} at batch {check.batch}: its outputs differ from the network's by {found[0]:.1e}, from "
        f"other batch sizes by {found[1]:.1e}, from the bundle's golden outputs by {found[2]:.1e}; allowed "
        f"{check.allowed:.1e}; {check.changed} of {check.rows} rows change class, allowed 0. Nothing was written; if "
        "the bundle's weights and golden data are right, name another compiler in $CC"
    )
