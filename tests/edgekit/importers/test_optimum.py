"""Hugging Face folders through optimum, whose exporter is played by torch's: it needs an environment of its own.
What is tested is what edgekit does around it: refusals, shapes, and the comparison that optimum only warns of."""

import json
import sys
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from edgekit.errors import EdgekitError
from edgekit.importers.optimum import from_optimum
from edgekit.session import open_session

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=8,
        num_labels=3,
    )
    model = transformers.ViTForImageClassification(config).eval()
    folder = tmp_path_factory.mktemp("hf") / "small-vit"
    model.save_pretrained(folder)
    return folder, model


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixels):
        return self.model(pixels).logits


@pytest.fixture
def exporter(monkeypatch):
    """exporter(spoil, also): optimum's main_export, which writes the folder's model after `spoil` has had it."""

    def install(spoil=lambda model: None, also=()):
        def main_export(path, task, output, trust_remote_code, local_files_only, **options):
            assert task == "image-classification"
            assert not trust_remote_code
            assert local_files_only
            model = transformers.ViTForImageClassification.from_pretrained(path, attn_implementation="eager").eval()
            with torch.no_grad():
                spoil(model)
            for name in also:
                (Path(output) / name).write_bytes(b"")
            free = {0: "batch_size", 1: "num_channels", 2: "height", 3: "width"}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.onnx.export(
                    Logits(model),
                    (torch.zeros(2, 3, 16, 16),),
                    Path(output) / "model.onnx",
                    dynamo=False,
                    opset_version=17,
                    input_names=["pixel_values"],
                    output_names=["logits"],
                    dynamic_axes={"pixel_values": free, "logits": {0: "batch_size"}},
                )

        for name in ("optimum", "optimum.exporters", "optimum.exporters.onnx", "optimum.exporters.tasks"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        sys.modules["optimum.exporters.onnx"].main_export = main_export
        kinds = {transformers.ViTForImageClassification: "image-classification"}
        sys.modules["optimum.exporters.tasks"].TasksManager = SimpleNamespace(infer_task_from_model=kinds.__getitem__)

    return install


def test_a_folder_becomes_a_graph_that_computes_the_same(vit, exporter):
    folder, model = vit
    exporter()
    bundle = from_optimum(folder)
    (spec,) = bundle.manifest.inputs
    assert (spec.name, spec.shape[1:]) == ("pixel_values", (3, 16, 16))
    assert bundle.is_graph
    assert bundle.manifest.classes == ("LABEL_0", "LABEL_1", "LABEL_2")
    pixels = np.random.default_rng(0).normal(0, 1, (5, 3, 16, 16)).astype(np.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(pixels)).logits.numpy()
    found = open_session(bundle, "onnxruntime", threads=1).run({"pixel_values": pixels})["logits"]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_graph_with_other_numbers_than_the_model_is_refused(vit, exporter):
    """optimum warns of it and exits with 0."""

    def spoil(model):
        model.classifier.bias[1] += 0.01

    exporter(spoil)
    with pytest.raises(
        EdgekitError, match=r"'logits' of optimum's graph differs from transformers' by .*e-0.; 0.001 is allowed"
    ):
        from_optimum(vit[0])


def test_what_does_not_fit_a_bundle_is_refused(vit, exporter):
    exporter(also=["model.onnx_data"])
    with pytest.raises(EdgekitError, match=r"optimum wrote model.onnx, model.onnx_data; .* one model.onnx below 2 GB"):
        from_optimum(vit[0])

    def fails(model):
        raise KeyError("vit-of-tomorrow")

    exporter(fails)
    with pytest.raises(EdgekitError, match=r"optimum cannot export it: .*vit-of-tomorrow"):
        from_optimum(vit[0])


def test_code_and_pickles_are_refused_before_optimum_sees_them(vit, exporter, tmp_path):
    exporter(lambda model: pytest.fail("exported"))
    config = json.loads((vit[0] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(EdgekitError, match="is a pickle"):
        from_optimum(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "evil.Model"}}))
    with pytest.raises(EdgekitError, match="code of its author"):
        from_optimum(tmp_path)
    for changes in ({"_attn_implementation": "evil/kernel"}, {"id2label": {"0": {"backbone": "evil/model"}}}):
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        (tmp_path / "model.safetensors").write_bytes(b"")
        with pytest.raises(EdgekitError, match=f"{tmp_path}: .*makes transformers load code or another model"):
            from_optimum(tmp_path)


@pytest.mark.parametrize("name", ["_attn_implementation", "backbone", "kernel_config", "quantization_config", "colour"])
def test_a_key_that_edgekit_does_not_know_is_refused_before_optimum_sees_it(name, vit, exporter, tmp_path):
    exporter(lambda model: pytest.fail("exported"))
    for file in vit[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((vit[0] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {name: "evil/kernel"}))
    with pytest.raises(EdgekitError, match=name):
        from_optimum(tmp_path)


def test_optimum_reads_a_copy_of_what_edgekit_has_read(vit, exporter, tmp_path):
    for file in vit[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for name in ("adapter_config.json", "adapter_model.bin", "generation_config.json", "modeling.py"):
        (tmp_path / name).write_bytes(b"evil")
    config = json.loads((vit[0] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"_name_or_path": "evil/model"}))
    exporter()
    export = sys.modules["optimum.exporters.onnx"].main_export
    seen = []

    def main_export(path, **options):
        seen.extend((file.name, b"evil" in file.read_bytes()) for file in Path(path).iterdir())
        export(path, **options)

    sys.modules["optimum.exporters.onnx"].main_export = main_export
    from_optimum(tmp_path)
    assert sorted(seen) == [("config.json", False), ("model.safetensors", False)]


def test_without_optimum_or_beside_transformers_5_the_way_out_is_named(vit, monkeypatch, edgekit, tmp_path):
    monkeypatch.setitem(sys.modules, "optimum", None)
    command = ("import", vit[0], "--via", "optimum", "-o", tmp_path / "vit.edge")
    assert edgekit(*command).failed_with(1, "pip install 'edgekit[optimum]'", "environment of its own")
    there = [
        SimpleNamespace(metadata={"Name": name}, version=version)
        for name, version in (("optimum-onnx", "0.1.0"), ("transformers", "5.23.0"))
    ]
    monkeypatch.setattr("edgekit.doctor.extras.distributions", lambda: there)
    assert edgekit(*command).failed_with(1, "optimum-onnx 0.1.0 and transformers 5.23.0 cannot work together", "4.58")
    wrong = edgekit("import", vit[0], "--via", "optimun", "-o", tmp_path / "vit.edge")
    assert wrong.status == 2
    assert "expected optimum" in wrong.err
