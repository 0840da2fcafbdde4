"""Write the weights as a table of text, once the model gives its golden outputs."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgekit.bundle.files import write_directory
from edgekit.bundle.format import Bundle
from edgekit.errors import EdgekitError
from edgekit.exporter import Export, Exporter
from edgekit.session import open_session


@dataclass(frozen=True, slots=True)
class TableExporter(Exporter):
    """digits: how many a number is written with."""

    digits: int = 9

    def export(self, bundle: Bundle, directory: str | Path, *, force: bool = False) -> Export:
        directory = Path(directory)
        if directory.exists() and not force:
            raise EdgekitError(f"{directory} already exists; choose another directory or pass --force")
        inputs, expected = bundle.golden()
        found = open_session(bundle, "torch", threads=1).run(inputs)
        far = max(float(np.abs(found[name] - array).max()) for name, array in expected.items())
        if not far < 1e-5:
            raise EdgekitError(
                f"{bundle.manifest.name}: its golden outputs are {far:.1e} from what it gives; 1e-5 allowed"
            )
        lines = [
            f"{name}\t{' '.join(f'{x:.{self.digits}g}' for x in value.flat)}"
            for name, value in bundle.weights().items()
        ]
        manifest = {"format": "table-1", "model": bundle.manifest.name}
        files = {"weights.tsv": "\n".join(lines).encode(), "manifest.json": json.dumps(manifest).encode()}
        write_directory(directory, files)
        sizes = {name: len(content) for name, content in files.items()}
        return Export(directory, sizes, manifest, [{"file": "weights.tsv", "difference": far}])
