"""edgekit: make a trained network run, fast and honestly, on hardware people already own.

    import edgekit

    result = edgekit.compress(network, data=(inputs, labels), auto=True)
    print(result)
    result.save("small.edge")

`import edgekit` imports neither torch nor numpy; each name imports what it needs when it is first used.
"""

from __future__ import annotations

import importlib
import os
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgekit.bundle.format import Bundle
    from edgekit.compression.bench import Timing, bench, bench_target
    from edgekit.compression.recipe import Step
    from edgekit.compression.record import PassRecord
    from edgekit.compression.result import Result
    from edgekit.cost.layers import Report
    from edgekit.data.dataset import Dataset
    from edgekit.errors import EdgekitError
    from edgekit.exporter import Export, export
    from edgekit.importers.api import (
        Session,
        import_factory,
        import_hugging_face,
        import_module,
        import_onnx,
        import_program,
    )
    from edgekit.importers.api import open_model as open
    from edgekit.nas.api import search_network
    from edgekit.search.compress import compress
    from edgekit.targets.profile import Target, list_targets

__version__ = "0.1.0"

# From version 1.29 on, onnxruntime reports the names of models and their use to its maker, unless this variable is set
# before it is imported. A user who wants that sets it to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_MODULES = {
    "edgekit.bundle.format": ("Bundle",),
    "edgekit.compression.bench": ("Timing", "bench", "bench_target"),
    "edgekit.compression.recipe": ("Step",),
    "edgekit.compression.record": ("PassRecord",),
    "edgekit.compression.result": ("Result",),
    "edgekit.cost.layers": ("Report",),
    "edgekit.data.dataset": ("Dataset",),
    "edgekit.errors": ("EdgekitError",),
    "edgekit.exporter": ("Export", "export"),
    "edgekit.importers.api": (
        "Session", "import_factory", "import_hugging_face", "import_module", "import_onnx", "import_program", "open",
    ),
    "edgekit.nas.api": ("search_network",),
    "edgekit.search.compress": ("compress",),
    "edgekit.targets.profile": ("Target", "list_targets"),
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}
_OWN_NAMES = {"open": "open_model"}  # in its module, where it must not hide Python's own

__all__ = [
    "Bundle",
    "Dataset",
    "EdgekitError",
    "Export",
    "PassRecord",
    "Report",
    "Result",
    "Session",
    "Step",
    "Target",
    "Timing",
    "__version__",
    "bench",
    "bench_target",
    "compress",
    "export",
    "import_factory",
    "import_hugging_face",
    "import_module",
    "import_onnx",
    "import_program",
    "list_targets",
    "open",
    "search_network",
]


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        found = getattr(importlib.import_module(_MODULE_OF[name]), _OWN_NAMES.get(name, name))
    # of the other packages, such as edgekit.llm; reading the installed packages takes 40 ms, and many a tool asks a
    # module for names such as __wrapped__
    elif not name.startswith("_") and (points := entry_points(group="edgekit.namespaces", name=name)):
        found = next(iter(points)).load()
    else:
        raise AttributeError(f"module 'edgekit' has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
