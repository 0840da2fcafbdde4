"""Compressing a language model from file to file: what is written, what is rolled back, what is refused."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest

from edgekit import cache
from edgekit.errors import EdgekitError
from edgekit.importers.gguf import read_gguf
from runtimes.llm.compression import plan, texts, work
from runtimes.llm.compression.guard import Budget
from runtimes.llm.compression.rounding import plain
from runtimes.llm.engine import Item
from runtimes.llm.model import compress, load
from runtimes.llm.source import of_gguf
from tests.gguf_files import encoded, gguf, toy_metadata, toy_model, toy_weights
from tests.runtimes.llm.conftest import compiler

ANY = Budget(1e9, 1e9, 0)
IDS = np.random.default_rng(7).integers(0, 300, 60)
SMALL = {"tokens": 192, "window": 96}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return toy_model(tmp_path_factory.mktemp("source"), "llama", "F16", layers=4)


@pytest.fixture(scope="module")
def prose(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    rng = np.random.default_rng(0)
    path.write_text(" ".join(rng.choice(["the", "thin", "red", "then", "and", "rain", "or", "an"], 300)))
    return path


def compressed(source, path, prose, budget=ANY, **options):
    return compress(source, path, text=[prose], budget=budget, **{**SMALL, **options})


def tensors(path):
    return {name: (item.format.name, item.content.tobytes()) for name, item in read_gguf(path).tensors.items()}


# --- what is written


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_every_family_is_written_and_read_back_by_all(family, tied, prose, tmp_path):
    package = pytest.importorskip("gguf", reason="the package gguf is not installed: pip install gguf")
    source, path = toy_model(tmp_path, family, "F32", tied=tied), tmp_path / "small.gguf"
    result = compressed(source, path, prose, format="Q4_1", method="awq+gptq")
    assert result.bytes == path.stat().st_size < source.stat().st_size / 4
    own = read_gguf(path)
    ends = {"token_embd.weight": "Q8_0"} | ({} if tied else {"output.weight": "Q8_0"})
    for name, tensor in own.tensors.items():
        expected = ends.get(name, "Q4_1" if len(tensor.shape) == 2 else "F32")
        assert tensor.format.name == expected, name
    for tensor in package.GGUFReader(path).tensors:
        found = package.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(found.reshape(own.tensors[tensor.name].shape), own.tensors[tensor.name].values())
    before = read_gguf(source)
    for key, value in before.raw.items():
        assert bytes(own.raw[key]) == bytes(value)
    assert own.metadata["general.file_type"] == 3
    with load(source, engine="torch") as old, load(path, engine="torch") as new:
        logits = [found.engine.step([Item(0, IDS, logits="all")])[0] for found in (old, new)]
    assert 0 < np.square(logits[0] - logits[1]).mean() < 0.2 * np.square(logits[0]).mean()


@compiler
def test_both_engines_find_the_quality_that_the_report_gives(source, prose, tmp_path):
    path = tmp_path / "small.gguf"
    held_out = plan.prepare(source, path, text=[prose], **SMALL).texts.held_out
    result = compressed(source, path, prose, method="awq+gptq")
    perplexities = {}
    for name in ("torch", "native"):
        losses = []
        with load(path, engine=name) as model:
            for number, ids in enumerate(held_out):
                logits = model.engine.step([Item(number, ids, logits="all")])[0].astype(np.float64)
                chances = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
                losses.append(-chances[np.arange(len(ids) - 1), ids[1:]])
        perplexities[name] = np.exp(np.concatenate(losses).mean())
    expected = result.quality.source_perplexity * (1 + result.quality.perplexity.value)
    assert perplexities["torch"] == pytest.approx(expected, rel=1e-4)
    assert perplexities["native"] == pytest.approx(expected, rel=0.03)  # its activations have 8 bits
    assert abs(result.quality.perplexity.value) > 3e-4, "the compression changes nothing"


def test_the_report_travels_in_the_file(source, prose, tmp_path):
    result = compressed(source, tmp_path / "small.gguf", prose)
    report = json.loads(read_gguf(tmp_path / "small.gguf").metadata["edgekit.compression"])
    assert report["quality"]["divergence"]["value"] == result.quality.divergence.value
    assert report["settings"]["method"] == "awq+gptq"
    assert [layer["formats"] for layer in report["layers"]] == [["Q4_0"]] * 4
    assert "path" not in report  # which would tell strangers about this machine
    assert str(tmp_path) not in json.dumps(report["source"])


def test_rounding_to_nearest_writes_the_bytes_that_llama_cpp_would(source, prose, tmp_path):
    package = pytest.importorskip("gguf", reason="the package gguf is not installed: pip install gguf")
    compressed(source, tmp_path / "small.gguf", prose, method="nearest", head="Q4_0")
    found, before = read_gguf(tmp_path / "small.gguf").tensors, read_gguf(source).tensors
    for name, tensor in found.items():
        if len(tensor.shape) == 2:
            expected = package.quantize(before[name].values(), package.GGMLQuantizationType.Q4_0)
            assert np.array_equal(tensor.rows(), expected)


def test_eight_bits_change_little(source, prose, tmp_path):
    results = {
        form: compressed(
            source, tmp_path / f"{form}.gguf", prose, format=form, method="nearest"
        ).quality.divergence.value
        for form in ("Q8_0", "Q4_0")
    }
    assert 0 < results["Q8_0"] < results["Q4_0"] / 50


def test_sensitive_layers_get_more_bits(source, prose, tmp_path, monkeypatch):
    def damages(*_):
        return [0.1, 0.4, 0.2, 0.3]

    monkeypatch.setattr(work, "layer_damages", damages)
    result = compressed(source, tmp_path / "small.gguf", prose, bits=6.6)  # half of the way from 4.5 to 8.5
    assert [layer.formats for layer in result.layers] == [["Q4_0"], ["Q8_0"], ["Q4_0"], ["Q8_0"]]
    assert "it alone diverges by 0.4000" in result.layers[1].reason
    assert result.bits == pytest.approx(6.5, abs=0.3)


def test_a_matrix_that_the_format_cannot_hold_stays_as_it_is(prose, tmp_path):
    source = toy_model(tmp_path, "llama", "F16", hidden=104)
    result = compressed(source, tmp_path / "small.gguf", prose, method="awq+gptq")
    found, before = tensors(tmp_path / "small.gguf"), tensors(source)
    for name, value in before.items():
        if "ffn_down" in name or "norm" in name:
            assert found[name] == value, name
        else:
            assert found[name][0] in ("Q4_0", "Q8_0"), name
    assert result.layers[0].formats == ["F16", "Q4_0"]


# --- the guard


def damaged(number, role="down"):
    """Quantising, with a bug in one layer that destroys a matrix."""
    real = work.quantised

    def quantise(layer, *arguments):
        found = real(layer, *arguments)
        tensor = getattr(found, role)
        if tensor.name.startswith(f"blk.{number}."):
            content = tensor.content.copy().reshape(-1, 18)
            content[:, 1] ^= 0x04  # the exponent of the scales
            found = replace(found, **{role: replace(tensor, content=content.reshape(-1))})
        return found

    return quantise


@pytest.mark.parametrize("number", [0, 2])
@pytest.mark.parametrize("method", ["gptq", "awq+gptq"])
def test_planted_damage_to_a_layer_is_found_and_rolled_back(method, number, source, prose, tmp_path, monkeypatch):
    whole = compressed(source, tmp_path / "whole.gguf", prose, method=method)
    budget = Budget(whole.quality.divergence.value * 1.2, 1e9, 0)
    monkeypatch.setattr(work, "quantised", damaged(number))
    broken = compressed(source, tmp_path / "broken.gguf", prose, method=method)
    assert broken.quality.divergence.value > 3 * budget.divergence
    result = compressed(source, tmp_path / "small.gguf", prose, budget, method=method)
    assert result.quality.divergence.value <= budget.divergence
    assert result.layers[number].formats == ["Q8_0"]
    reason = result.layers[number].reason
    assert (
        f"with all layers compressed the model diverges from the source by {broken.quality.divergence.value:.4f}"
        in reason
    )
    assert reason.startswith("rolled back to Q8_0: alone in Q4_0 it diverges by ")
    assert "(number 1 of 4 layers)" in reason
    damages = [layer.damage for layer in result.layers]
    assert damages[number] == max(damages)
    # layers behind the damage were calibrated on what it put out, so scaling may need a second one to go back
    others = [layer.number for layer in result.layers if layer.reason and layer.number != number]
    assert others == [] if method == "gptq" else len(others) <= 1
    assert all(result.layers[at].formats == ["Q4_0"] for at in range(4) if at not in (number, *others))
    found, wrong = tensors(tmp_path / "small.gguf"), tensors(tmp_path / "broken.gguf")
    assert {int(name.split(".")[1]) for name in found if found[name] != wrong[name]} == {number, *others}


def test_damage_in_every_format_leaves_the_layer_of_the_source(source, prose, tmp_path, monkeypatch):
    monkeypatch.setattr(work, "quantised", damaged(1))
    real = work.in_format

    def in_format(layer, form):
        found = real(layer, form)
        if not found.down.name.startswith("blk.1."):
            return found
        return replace(found, down=plain(found.down.name, -found.down.values()))

    monkeypatch.setattr(work, "in_format", in_format)
    result = compressed(source, tmp_path / "small.gguf", prose, Budget(0.02, 1e9, 0))
    assert result.layers[1].formats == ["F16"]
    assert result.layers[1].reason.startswith("rolled back to the source's format")
    found, before = tensors(tmp_path / "small.gguf"), tensors(source)
    assert all(found[name] == before[name] for name in found if name.startswith("blk.1."))


def test_a_budget_of_nothing_writes_no_file(source, prose, tmp_path):
    with pytest.raises(EdgekitError, match="nothing can be compressed within the budget"):
        compressed(source, tmp_path / "small.gguf", prose, Budget(0, 0, 1))
    assert not (tmp_path / "small.gguf").exists()


# --- stopped jobs


def test_a_stopped_job_leaves_no_file_and_goes_on_where_it_was(source, prose, tmp_path, monkeypatch):
    compressed(source, tmp_path / "whole.gguf", prose)
    done, real = [], work.quantised

    def counted(layer, *arguments):
        done.append(layer.down.name)
        return real(layer, *arguments)

    monkeypatch.setattr(work, "quantised", counted)

    def stop(what, number, total):
        if (what, number) == ("layers", 2):
            raise KeyboardInterrupt

    path = tmp_path / "small.gguf"
    with pytest.raises(KeyboardInterrupt):
        compressed(source, path, prose, progress=stop)
    assert [item.name for item in tmp_path.iterdir() if "small" in item.name] == []
    assert len(done) == 2
    (folder,) = (cache.root() / plan.FOLDER).iterdir()
    assert {item.stat().st_mode & 0o777 for item in folder.iterdir()} == {0o600}
    compressed(source, path, prose)
    assert len(done) == len(set(done)) == 4
    assert tensors(path) == tensors(tmp_path / "whole.gguf")
    assert [*(cache.root() / plan.FOLDER).iterdir()] == []  # nothing is left of a job that is done


def test_layers_of_another_job_are_not_taken(source, prose, tmp_path, monkeypatch):
    def stop(what, number, total):
        if number == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compressed(source, tmp_path / "small.gguf", prose, progress=stop, method="awq")
    compressed(source, tmp_path / "other.gguf", prose, method="gptq")
    compressed(source, tmp_path / "small.gguf", prose, method="awq")
    compressed(source, tmp_path / "again.gguf", prose, method="gptq")
    assert tensors(tmp_path / "other.gguf") == tensors(tmp_path / "again.gguf") != tensors(tmp_path / "small.gguf")


def test_old_jobs_are_deleted(source, prose, tmp_path):
    import os

    for name, age in (("old", work.OLDEST + 60), ("new", 60)):
        folder = cache.folder(plan.FOLDER) / name
        folder.mkdir(mode=0o700)
        past = folder.stat().st_mtime - age
        os.utime(folder, (past, past))
    compressed(source, tmp_path / "small.gguf", prose)
    assert [item.name for item in (cache.root() / plan.FOLDER).iterdir()] == ["new"]


# --- the text


def test_calibration_and_measurement_share_no_token(source, prose):
    job = plan.prepare(source, "small.gguf", text=[prose], window=64)
    windows = [tuple(ids) for ids in (*job.texts.calibration, *job.texts.held_out)]
    assert {len(ids) for ids in windows} == {64}
    every = of_gguf(read_gguf(source)).tokenizer.encode(prose.read_text(), begin=False)
    pairs = itertools.zip_longest(job.texts.calibration, job.texts.held_out)  # the last window may be alone
    joined = [ids for pair in pairs for ids in pair if ids is not None]
    assert np.array_equal(np.concatenate(joined), every[: 64 * len(joined)])


def test_a_model_that_wants_a_beginning_gets_it_in_each_window(prose, tmp_path):
    metadata = toy_metadata("llama") | {"tokenizer.ggml.bos_token_id": 306, "tokenizer.ggml.add_bos_token": True}
    weights = {name: ("F32", value.shape, encoded(value, "F32")) for name, value in toy_weights("llama").items()}
    (tmp_path / "model.gguf").write_bytes(gguf(metadata, weights))
    job = plan.prepare(tmp_path / "model.gguf", "small.gguf", text=[prose], window=64)
    assert {ids[0] for ids in (*job.texts.calibration, *job.texts.held_out)} == {306}


def test_texts_ship():
    found = texts.shipped()
    assert any("Apache License" in text for text in found.values())
    assert sum(map(len, found.values())) > 10_000


# --- what is refused, before work starts


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"format": "Q3_K"}, "unknown format of a compressed language model 'Q3_K'; expected one of: Q4_0, Q4_1, Q8_0"),
        ({"method": "magic"}, "unknown method .*'magic'; expected one of: nearest, gptq, awq, awq"),
        ({"head": "F64"}, "unknown head "),
        ({"bits": 3}, r"bits = 3; expected 4.5 \(Q4_0 in all layers\) to 8.5 \(Q8_0\)"),
        ({"window": 1}, "window = 1; expected 64 or more tokens"),
        ({"tokens": 0}, "tokens = 0"),
        ({"colour": "red"}, "does not take these settings"),
    ],
)
def test_settings_without_meaning_are_one_line(options, text, source, prose, tmp_path):
    with pytest.raises(EdgekitError, match=text):
        compressed(source, tmp_path / "small.gguf", prose, **options)


@pytest.mark.parametrize("form", ["Q4_0", "Q4_1"])
def test_a_source_of_few_bits_is_refused(form, prose, tmp_path):
    source = toy_model(tmp_path, "llama", form)
    with pytest.raises(EdgekitError, match=f"'blk.0.attn_q.weight' is in {form}, .* start from the model's F16"):
        compressed(source, tmp_path / "small.gguf", prose)


def test_a_source_that_becomes_no_smaller_is_refused(prose, tmp_path):
    source = toy_model(tmp_path, "llama", "Q8_0")
    with pytest.raises(EdgekitError, match=r"no matrix becomes smaller in Q8_0: Q8_0 takes 8\.5 bits"):
        compressed(source, tmp_path / "small.gguf", prose, format="Q8_0")


def test_texts_and_files_that_do_not_serve_are_refused(source, prose, tmp_path, monkeypatch):
    path, short = tmp_path / "small.gguf", tmp_path / "short.txt"
    short.write_text("too short")
    with pytest.raises(EdgekitError, match=r"the text for calibration has \d+ tokens .*expected 128 or more"):
        compressed(source, path, short)
    with pytest.raises(EdgekitError, match="no such file; expected a text"):
        compressed(source, path, tmp_path / "missing.txt")
    monkeypatch.setattr(texts, "shipped", texts.shipped)
    monkeypatch.setattr(texts.importlib.metadata, "files", lambda name: None)
    monkeypatch.setattr(texts.importlib, "import_module", lambda name: (_ for _ in ()).throw(ImportError(name)))
    with pytest.raises(EdgekitError, match="no text for calibration ships with this installation"):
        compress(source, path)
    with pytest.raises(EdgekitError, match=r"expected a file name that ends in \.gguf"):
        compressed(source, tmp_path / "small.bin", prose)
    path.write_bytes(b"mine")
    with pytest.raises(EdgekitError, match="already exists"):
        compressed(source, path, prose)
    assert path.read_bytes() == b"mine"


@pytest.mark.parametrize("where", ["output", "cache"])
def test_a_disk_without_room_is_refused(where, source, prose, tmp_path, monkeypatch):
    from shutil import _ntuple_diskusage as usage

    full = {"output": tmp_path / "out", "cache": tmp_path / "cache"}[where]
    full.mkdir(mode=0o700)
    monkeypatch.setattr(
        plan.shutil, "disk_usage", lambda path: usage(10, 0, 1000 if full in (path, *path.parents) else 1 << 40)
    )
    with pytest.raises(EdgekitError, match="1,000 bytes are free, and the result takes about"):
        compressed(source, tmp_path / "out" / "small.gguf", prose)


def test_weights_that_are_no_numbers_are_refused_with_their_name(prose, tmp_path):
    weights = toy_weights("llama")
    weights["blk.1.ffn_up.weight"][3, 5] = np.nan
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf(toy_metadata("llama"), {k: ("F32", v.shape, encoded(v, "F32")) for k, v in weights.items()}))
    with pytest.raises(EdgekitError, match=r"'blk\.1\.ffn_up\.weight' holds NaN"):
        compressed(path, tmp_path / "small.gguf", prose, method="nearest")


# --- the command


def test_the_command_prints_the_report(edgekit, source, prose, tmp_path):
    path = tmp_path / "small.gguf"
    options = (source, "-o", path, "--text", prose, "--tokens", 192, "--window", 96, "--max-divergence", 9)
    options = ("llm", "compress", *map(str, options), "--max-perplexity", "9", "--min-agreement", "0")
    found = edgekit(*options)
    assert found.status == 0
    assert "KL divergence" in found.out
    assert f"to {path.stat().st_size:,} bytes" in found.out
    report = json.loads(edgekit(*options, "--json", "--force").out)
    assert report["bytes"] == path.stat().st_size
    assert len(report["layers"]) == 4
    again = edgekit(*options)
    assert again.status == 1
    assert "already exists" in again.err


def test_a_dry_run_says_what_would_happen_and_does_nothing(edgekit, source, prose, tmp_path):
    path = tmp_path / "small.gguf"
    options = ("llm", "compress", str(source), "-o", str(path), "--text", str(prose), "--dry-run")
    rows = {row["tensor"]: row for row in json.loads(edgekit(*options, "--json").out)}
    assert rows["blk.0.attn_q.weight"]["after"] == "Q4_0"
    assert rows["token_embd.weight"]["after"] == "Q8_0"
    assert len(rows) == 1 + 4 * 7
    assert "dry run" in edgekit(*options).out
    assert not path.exists()


@pytest.mark.parametrize(
    ("options", "problem"),
    [(("--format", "q3"), "unknown format"), (("--max-divergence", "-1"), "budget of divergence")],
)
def test_bad_options_are_one_line(edgekit, source, prose, tmp_path, options, problem):
    found = edgekit("llm", "compress", str(source), "-o", str(tmp_path / "s.gguf"), "--text", str(prose), *options)
    assert found.status == 1
    assert problem in found.err


@pytest.mark.parametrize(
    ("changes", "what"),
    [({"gate": None}, "no weight 'gate'"), ({"post_mlp_norm": "mlp_norm"}, "the weight 'post_mlp_norm'")],
)
def test_layers_of_other_families_are_refused(changes, what, source, prose, tmp_path, monkeypatch):
    read = plan.of_gguf

    def changed(file):
        found = read(file)
        first, *rest = found.model.layers
        first = replace(first, **{role: other and getattr(first, other) for role, other in changes.items()})
        return replace(found, model=replace(found.model, layers=[first, *rest]))

    monkeypatch.setattr(plan, "of_gguf", changed)
    with pytest.raises(EdgekitError, match=f"layers of llama have {what}; edgekit compresses"):
        compress(source, tmp_path / "small.gguf", text=[prose], **SMALL)
