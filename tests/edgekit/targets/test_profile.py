"""Targets: every shipped file is valid; for a file with a mistake, the error names the key and the nearest valid
one."""

import math
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from edgekit.errors import EdgekitError
from edgekit.targets import profile

FOLDER = Path(profile.__file__).parent / "profiles"
SHIPPED = sorted(path.stem for path in FOLDER.glob("*.toml"))
ISSUE = {
    "tesla-p40", "rtx-3060-12gb", "rtx-3060-8gb", "jetson-nano", "jetson-tx2", "jetson-xavier-nx",
    "jetson-orin-nano-4gb", "jetson-orin-nano-8gb", "jetson-orin-nano-8gb-super", "jetson-orin-nx-8gb",
    "jetson-orin-nx-16gb", "jetson-agx-orin-32gb", "jetson-agx-orin-64gb", "h200", "x86-avx2", "x86-avx512",
    "raspberry-pi-5",
}  # fmt: skip
WORDS = (
    "data sheet",
    "vendor",
    "measured",
    "computed",
    "assumed",
    "general knowledge",
    "guide",
    "nvpmodel",
    "Deep-Learning-Accelerator",
)
OPSETS = {"8.2": 13, "8.5": 17, "8.6": 17, "10": 21, "11": 21, "1.7": 21}  # newest, by generation of TensorRT
CAPABILITIES = {
    "tesla-p40": "6.1", "jetson-nano": "5.3", "jetson-tx2": "6.2", "jetson-xavier-nx": "7.2", "rtx-3060-12gb": "8.6",
    "jetson-orin-nano-8gb": "8.7", "h200": "9.0",
}  # fmt: skip


def text(name="tesla-p40"):
    return (FOLDER / f"{name}.toml").read_text("utf-8")


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Return a function that writes a profile into the user's folder and returns its path."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    folder = tmp_path / "edgekit" / "targets"
    folder.mkdir(parents=True)

    def write(content, name="tesla-p40"):
        path = folder / f"{name}.toml"
        path.write_text(content, "utf-8")
        return path

    return write


def test_every_device_of_the_matrix_is_there():
    assert set(SHIPPED) >= ISSUE


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_file_is_sound(name):
    target = profile.read(FOLDER / f"{name}.toml")
    figures = [target.memory, target.bandwidth, target.launch]
    for rate in target.rates.values():
        figures += [rate.dense, *([rate.sparse] if rate.sparse else [])]
        assert rate.sparse is None or rate.sparse.value == pytest.approx(2 * rate.dense.value, rel=0.01)
    for figure in figures:
        assert any(word in figure.source for word in WORDS), figure
    assert 1e9 <= target.memory.value <= 1e12, "bytes, not gigabytes"
    assert 1e10 <= target.bandwidth.value <= 1e13
    assert 1e-7 <= target.launch.value <= 1e-4
    assert all(1e10 <= rate.dense.value <= 1e16 for rate in target.rates.values())
    assert all(mode.source and mode.watts > 0 for mode in target.power)
    assert not target.power or target.power[0].share == 1
    assert set(target.plan.never) | set(target.plan.order) <= set(profile.PRECISIONS)
    for lines in [stack.requirements for stack in target.stacks] + [[n.requirement] for n in target.never]:
        for line in filter(None, lines):
            Requirement(line)


@pytest.mark.parametrize("name", SHIPPED)
def test_stacks_agree_with_their_generation_of_tensorrt(name):
    target = profile.find(name)
    for stack in target.stacks:
        if stack.runtime in ("tensorrt", "tensorrt-rtx"):
            generation = next(key for key in OPSETS if stack.tensorrt.startswith(key))
            assert stack.opset == OPSETS[generation]
            assert stack.typing == ("weak" if generation.startswith("8.") else "strong")
        else:
            assert not stack.tensorrt
            assert not stack.typing
        assert stack.source
    if target.kind == "jetson":
        assert all(stack.jetpack and not stack.requirements for stack in target.stacks)
        assert target.unified_memory
        assert target.device_tree


@pytest.mark.parametrize("name", SHIPPED)
def test_no_stack_installs_what_must_never_be_used(name):
    """The plain pip command for the P40 did: it installs a cuDNN without code for that GPU."""
    target = profile.find(name)
    banned = [Requirement(item.requirement) for item in target.never if item.requirement]
    for stack in target.stacks:
        for line in stack.requirements:
            wanted = Requirement(line)
            pins = [Version(item.version) for item in wanted.specifier if item.operator == "=="]
            clashes = [b for b in banned if b.name == wanted.name and any(pin in b.specifier for pin in pins)]
            assert clashes == []


def test_a_stack_that_installs_what_is_banned_would_be_found(written):
    content = text().replace('"nvidia-cudnn-cu12==9.10.2.21",', '"nvidia-cudnn-cu12==9.28.0.42",')
    target = profile.read(written(content, "tesla-p40"))
    banned = next(Requirement(item.requirement) for item in target.never if "cudnn" in item.requirement)
    assert Version("9.28.0.42") in banned.specifier
    assert Version("9.10.2.21") not in banned.specifier


@pytest.mark.parametrize(("name", "capability"), CAPABILITIES.items())
def test_compute_capabilities(name, capability):
    target = profile.find(name)
    assert target.compute_capability == capability
    assert target.sm == int(capability.replace(".", ""))


def test_rates_follow_from_units_and_clocks():
    """Compare the rates with the clocks and with the operations per clock and multiprocessor of the CUDA guide."""
    for name, units, clock, float16 in (
        ("jetson-nano", 1, 0.9216e9, 512),
        ("jetson-tx2", 2, 1.3e9, 512),
        ("tesla-p40", 30, 1.531e9, 4),
        ("rtx-3060-12gb", 28, 1.777e9, 1024),
        ("jetson-xavier-nx", 6, 1.1e9, 1024),
        ("jetson-orin-nano-8gb-super", 8, 1.02e9, 2048),
        ("jetson-agx-orin-64gb", 16, 1.3e9, 2048),
    ):
        target = profile.find(name)
        per_unit = 2 * target.units["CUDA cores"] / target.units["SMs"]
        assert target.units["SMs"] == units
        assert target.rates["float32"].dense.value == pytest.approx(units * clock * per_unit, rel=0.01)
        assert target.rates["float16"].dense.value == pytest.approx(units * clock * float16, rel=0.03)


def test_a_p40_never_gets_half_and_a_nano_no_int8():
    p40, nano = profile.find("tesla-p40"), profile.find("jetson-nano")
    p40.refuse("float32")
    p40.refuse("int8")
    with pytest.raises(EdgekitError, match=r"tesla-p40 must not be given float16: .*1/64.*float32, int8"):
        p40.refuse("float16")
    with pytest.raises(EdgekitError, match=r"jetson-nano must not be given int8: .*dp4a"):
        nano.refuse("int8")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("bandwidth =", "bandwith =", r"unknown key 'bandwith' .*did you mean 'bandwidth'"),
        ("round_to =", "round_too =", r"unknown key 'round_too' in .*plan.*did you mean 'round_to'"),
        ("[rates]\n", "[rates]\nfloat_16 = { dense = { value = 1, source = 'x' } }\n", r"unknown precision 'float_16'"),
        ('title = "NVIDIA Tesla P40"\n', "", r"key 'title' is missing"),
        ('[plan]\norder = ["float32", "int8"]\n', "[plan]\n", r"plan: key 'order' is missing"),
        ("round_to = 4", 'round_to = "4"', r"plan: round_to = '4'; expected a whole number"),
        ("round_to = 4", "round_to = 0", r"round_to = 0"),
        ("opset = 17", "opset = 17.5", r"stacks\[1\]: opset = 17.5; expected a whole number"),
        ('kind = "gpu"', 'kind = "gp"', r"unknown kind 'gp' .*gpu, jetson, cpu; did you mean 'gpu'"),
        ('compute_capability = "6.1"', 'compute_capability = "sm_61"', r"compute_capability = 'sm_61'"),
        ('compute_capability = "6.1"\n', "", r"compute_capability = ''"),
        ("value = 346e9", "value = 0", r"bandwidth: value = 0"),
        ("value = 346e9", "value = nan", r"bandwidth: value = nan"),
        ("value = 346e9", "value = true", r"bandwidth: value = True; expected a number"),
        ('source = "data sheet" }', 'source = "  " }', r"bandwidth: .*source"),
        ('order = ["float32", "int8"]', 'order = ["float32", "int8", "float16"]', r"'float16' is both in the plan"),
        ('order = ["float32", "int8"]', 'order = ["float32", "int4", "int8"]', r"plan uses int4, for which no rate"),
        ('int8 = "s8s8"', 'int8 = "s8u8"', r"unknown int8 's8u8'"),
        ('int8 = "s8s8"', 'int8 = "none"', r"a plan with int8 names its scheme"),
        ('name = "tesla-p40"', 'name = "tesla-p4"', r"name = 'tesla-p4'; expected the file's own name, 'tesla-p40'"),
        ("[plan]", "[plan", r"not valid TOML"),
    ],
)
def test_a_mistake_is_an_error_that_names_it(written, old, new, message):
    content = text()
    assert old in content
    path = written(content.replace(old, new, 1))
    with pytest.raises(EdgekitError, match=message) as caught:
        profile.read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_users_own_file_is_found_and_goes_before_ours(written):
    profile.read(written(text().replace("tesla-p40", "my-card"), "my-card"))
    assert "my-card" in profile.names()
    assert profile.find("my-card").title == "NVIDIA Tesla P40"
    written(text().replace("NVIDIA Tesla P40", "mine"))
    assert profile.find("tesla-p40").title == "mine"


def test_a_file_can_be_named_itself(tmp_path):
    path = tmp_path / "other.toml"
    path.write_text(text().replace("tesla-p40", "other"))
    assert profile.find(str(path)).name == "other"
    with pytest.raises(EdgekitError, match="no such target file"):
        profile.find(str(tmp_path / "absent.toml"))


def test_an_unknown_target_lists_what_is_there():
    with pytest.raises(EdgekitError, match=r"unknown target 'tesla-p4'.*x86-avx512; did you mean 'tesla-p40'"):
        profile.find("tesla-p4")


def test_stacks_by_runtime():
    target = profile.find("tesla-p40")
    assert target.stack.runtime == "onnxruntime"
    assert target.stack_for("tensorrt").tensorrt == "8.6.1"
    with pytest.raises(EdgekitError, match=r"unknown runtime 'openvino' in tesla-p40; expected .*onnxruntime, tensorr"):
        target.stack_for("openvino")


def test_every_key_of_a_file_reaches_the_target():
    """No key is lost: the file and the target hold the same numbers."""
    values = tomllib.loads(text("jetson-agx-orin-64gb"))
    target = profile.find("jetson-agx-orin-64gb")
    assert [mode.share for mode in target.power] == [item["share"] for item in values["power"]]
    assert [item.what for item in target.never] == [item["what"] for item in values["never"]]
    assert math.isclose(target.rates["int8"].sparse.value, values["rates"]["int8"]["sparse"]["value"])
    assert target.plan.reason == values["plan"]["reason"]


def test_reading_targets_imports_neither_torch_nor_onnx():
    code = (
        "import sys; from edgekit.targets import profile; [profile.find(name) for name in profile.names()];"
        "assert not {'torch', 'onnx', 'numpy'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("line", ['title = "a\\nrm -rf x"', 'title = "a\\u001b[31m"', 'title = "a\\u202eb"'])
def test_a_text_that_would_begin_a_new_line_of_a_script_is_refused(line, tmp_path):
    key = line.partition(" ")[0]
    text = (FOLDER / "tesla-p40.toml").read_text()
    kept = [old for old in text.splitlines() if not old.startswith(f"{key} =")]
    (tmp_path / "tesla-p40.toml").write_text("\n".join([line, *kept]))
    with pytest.raises(EdgekitError, match="holds a control character; write each text on one line"):
        profile.read(tmp_path / "tesla-p40.toml")


@pytest.mark.parametrize("content", [b"a = " + b"[" * 100_000, b"a." * 100_000 + b"b = 1", b"\xff", b"a = 1_", b"\0"])
def test_a_file_that_breaks_the_parser_is_one_line(content, tmp_path):
    (tmp_path / "x.toml").write_bytes(content)
    with pytest.raises(EdgekitError, match=r"x\.toml: ") as caught:
        profile.read(tmp_path / "x.toml")
    assert "\n" not in str(caught.value)
