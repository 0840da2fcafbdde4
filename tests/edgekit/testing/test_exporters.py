"""The check of exporters: edgekit's own keep the contract, and each planted violation is caught."""

import shutil
from dataclasses import replace

import pytest

from edgekit.errors import EdgekitError
from edgekit.testing import check_exporter
from exporters.c_export import CExporter
from exporters.onnx_export import OnnxExporter


@pytest.mark.parametrize("exporter", [OnnxExporter(), CExporter()], ids=["onnx", "c"])
def test_exporters_that_keep_the_contract(exporter, toy, tmp_path):
    check_exporter(exporter, toy(), tmp_path)


class Overwrites(OnnxExporter):
    def export(self, bundle, directory, *, force=False):
        return super().export(bundle, directory, force=directory.exists())


class LeavesFiles(OnnxExporter):
    def export(self, bundle, directory, *, force=False):
        if not directory.exists():
            directory.mkdir()
        try:
            return super().export(bundle, directory, force=force)
        except EdgekitError:
            (directory / "half.onnx").write_bytes(b"half an export")
            raise


class ProvesNothing(OnnxExporter):
    """Writes whatever the bundle says."""

    def export(self, bundle, directory, *, force=False):
        try:
            return super().export(bundle, directory, force=force)
        except EdgekitError:
            if directory.exists():
                raise
            directory.mkdir()
            (directory / "model.onnx").write_bytes(bundle.digest.encode())


class SpoilsWhenRefused(OnnxExporter):
    def export(self, bundle, directory, *, force=False):
        if directory.exists() and not force:
            (directory / "model.onnx").write_bytes(b"")
        return super().export(bundle, directory, force=force)


class Miscounts(OnnxExporter):
    def export(self, bundle, directory, *, force=False):
        made = super().export(bundle, directory, force=force)
        return replace(made, files={"model.onnx": 1})


class NoChecks(OnnxExporter):
    def export(self, bundle, directory, *, force=False):
        return replace(super().export(bundle, directory, force=force), checks=[])


EXPORTERS = {
    Overwrites: "took an existing folder without force",
    LeavesFiles: "has left 'damaged' behind",
    ProvesNothing: "took a bundle whose golden outputs",
    SpoilsWhenRefused: "has changed the files",
    Miscounts: "Export.files says",
    NoChecks: "Export.checks is empty",
}


@pytest.mark.parametrize(("kind", "words"), EXPORTERS.items(), ids=lambda item: getattr(item, "__name__", ""))
def test_a_planted_violation_of_an_exporter_is_caught(kind, words, toy, tmp_path):
    with pytest.raises(AssertionError, match=words):
        check_exporter(kind(), toy(), tmp_path)
    shutil.rmtree(tmp_path)
