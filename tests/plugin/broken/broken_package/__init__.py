"""Three plug-ins that break their contracts."""

from dataclasses import dataclass


@dataclass(frozen=True)
class NoBase:
    """It looks like a pass and does not derive from Pass."""

    name = "no_base"
    summary = "does not derive from Pass"

    def plan(self, candidate):
        return []

    def apply(self, candidate, context):
        return candidate


@dataclass(frozen=True)
class NoExport:
    """Options without the method that writes."""

    level: int = 1


class NoRun:
    """A session that cannot be run."""

    def __init__(self, bundle, *, threads=None, chunk=None):
        self.inputs, self.outputs = bundle.manifest.inputs, bundle.manifest.outputs

    def warmup(self, batch):
        pass
