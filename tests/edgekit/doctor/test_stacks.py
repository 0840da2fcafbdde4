"""Which stack of a target fits a machine: versions at the border, the nearest memory, commands that can be typed."""

from dataclasses import replace

import pytest

from edgekit.doctor import stacks
from edgekit.doctor.stacks import (
    branch,
    differing,
    fitting,
    forbidden,
    guess,
    jetpack,
    lacking,
    pins,
    remedy,
    unfit,
    within,
)
from edgekit.doctor.system import Cpu, Gpu, Jetson, Provider, System
from edgekit.targets import profile
from edgekit.targets.profile import Never, Stack

TARGETS = [profile.find(name) for name in profile.names()]
P40 = profile.find("tesla-p40")


def system(**changes):
    return System(**({"machine": "x86_64", "python": "3.11.2"} | changes))


def stack(**changes):
    return Stack(**({"name": "s", "runtime": "onnxruntime", "source": "test"} | changes))


def target(*stacks_of, never=()):
    return replace(P40, stacks=stacks_of, never=never)


@pytest.mark.parametrize(
    ("version", "specifier", "inside"),
    [
        ("3.6.9", "3.6", True),
        ("3.60", "3.6", False),
        ("3.6", "3.6", True),
        ("3.11.2", ">=3.11", True),
        ("3.10.9", ">=3.11", False),
        ("1.27.0.dev3", ">=1.26", True),  # nightly builds count
        ("580", ">=525,<=580", True),
        ("581", ">=525,<=580", False),
        ("10.3.0+cuda12", "10.3", True),
        ("jetson-special", ">=1", False),
        ("1.0", "latest", False),
    ],
)
def test_versions_within_a_specifier(version, specifier, inside):
    assert within(version, specifier) == inside


@pytest.mark.parametrize(("driver", "number"), [("580.65.06", 580), ("470", 470), ("", 0), ("nouveau", 0)])
def test_the_branch_of_a_driver(driver, number):
    assert branch(driver) == number


@pytest.mark.parametrize(
    ("found", "release"),
    [(None, ""), (Jetson("36.4.3", "6.2"), "6.2"), (Jetson("36.4.3"), "6"), (Jetson("99.1"), ""), (Jetson(), "")],
)
def test_the_release_of_jetpack_or_its_major_version(found, release):
    assert jetpack(system(jetson=found)) == release


@pytest.mark.parametrize(
    ("changes", "machine", "words"),
    [
        ({"python": "3.6"}, {"python": "3.11.2"}, "it is for Python 3.6, here is 3.11.2"),
        ({"driver": "<=580"}, {"driver": "590.1"}, "it is for drivers <=580, here is 590.1"),
        ({"jetpack": "6.2"}, {"jetson": Jetson("35.4.1")}, "it is for JetPack 6.2, here is 5"),
    ],
)
def test_what_no_package_can_change_makes_a_stack_unfit(changes, machine, words):
    chosen = stack(**changes)
    assert unfit(system(**machine), target(chosen), chosen) == [words]
    assert unfit(system(python=""), target(chosen), chosen) == [], "what is not known prevents nothing"
    assert unfit(system(**machine), target(stack()), stack()) == []


def test_a_stack_of_another_minor_release_of_jetpack_fits():
    chosen = stack(jetpack="6.2")
    assert unfit(system(jetson=Jetson("36.3.0", "6.0")), target(chosen), chosen) == []


def test_stacks_that_fit_or_all_of_them():
    old, new = stack(name="old", python="3.6"), stack(name="new", python=">=3.11")
    assert fitting(system(), target(old, new)) == (new,)
    assert fitting(system(python="3.9.1"), target(old, new)) == (old, new)
    assert fitting(system(), None) == ()


def test_pins_are_of_the_first_fitting_stack_that_names_a_package():
    first = stack(name="a", requirements=("onnxruntime-gpu==1.18.1", "numpy<2"))
    second = stack(name="b", requirements=("TensorRT_RTX==1.7",))
    both = target(replace(first, python="3.6"), first, second)
    assert pins(system(), both, ["onnxruntime-gpu"]) == "pip install onnxruntime-gpu==1.18.1"
    assert pins(system(), both, ["Onnxruntime.GPU", "numpy"]) == "pip install onnxruntime-gpu==1.18.1 'numpy<2'"
    assert pins(system(), both, ["tensorrt-rtx"]) == "pip install TensorRT_RTX==1.7"
    assert pins(system(), both, ["openvino"]) == ""


def test_a_package_that_must_never_be_used_is_found_under_any_spelling():
    rules = (Never("cuDNN", "slow", "test", "nvidia-cudnn-cu12>=9.11"), Never("fp16", "slow", "test"))
    chosen = target(stack(), never=rules)
    assert forbidden(chosen, {"nvidia_cudnn_cu12": "9.11.0"}) == [("nvidia-cudnn-cu12", "9.11.0", rules[0])]
    assert forbidden(chosen, {"Nvidia-cuDNN.cu12": "9.10.2"}) == []
    assert forbidden(chosen, {}) == []


def test_what_a_stack_lacks():
    rule = Never("it", "slow", "test", "onnxruntime-gpu>=1.19")
    chosen = stack(requirements=("onnxruntime-gpu==1.18.1", "numpy<2"), provider="CUDAExecutionProvider")
    here = system(packages={"onnxruntime-gpu": "1.19.0"})
    assert lacking(here, target(chosen, never=(rule,)), chosen) == [
        "onnxruntime-gpu 1.19.0 must not be used",
        "not installed: numpy",
        "onnxruntime has no CUDAExecutionProvider",
    ]
    runs = Provider("CUDAExecutionProvider", ran=("CUDAExecutionProvider",))
    whole = system(packages={"onnxruntime-gpu": "1.18.1", "numpy": "1.26"}, providers=(runs,))
    assert lacking(whole, target(chosen), chosen) == []
    idle = replace(whole, providers=(replace(runs, ran=("CPUExecutionProvider",)),))
    assert lacking(idle, target(chosen), chosen) == ["nothing ran on CUDAExecutionProvider"]
    assert lacking(system(), target(stack(runtime="c")), stack(runtime="c")) == ["there is no C compiler"]


@pytest.mark.parametrize(
    ("installed", "wanted", "complete"),
    [
        ("8.5.2", "8.5", True),
        ("8.6.1", "8.5", False),
        ("10.7.0", "10.3", True),
        ("10.3", "8.5", False),
        ("", "8.5", False),
    ],
)
def test_tensorrt_of_the_system_is_the_stacks_up_to_what_changes_its_parser(installed, wanted, complete):
    """Up to 8, each minor release reads other operators."""
    chosen = stack(runtime="tensorrt", tensorrt=wanted)
    here = system(packages={"tensorrt": installed} if installed else {})
    assert (lacking(here, target(chosen), chosen) == []) == complete


def test_versions_that_differ_from_the_pins_are_named():
    chosen = stack(requirements=("numpy<2", "onnx==1.17.0", "absent==1"))
    assert differing(system(packages={"numpy": "2.1", "onnx": "1.17.0"}), chosen) == ["numpy 2.1 instead of <2"]


def test_the_remedy_uninstalls_what_would_share_a_folder_and_quotes_what_a_shell_would_read():
    chosen = stack(requirements=("onnxruntime-gpu==1.18.1", "numpy<2"))
    install = "pip install onnxruntime-gpu==1.18.1 'numpy<2'"
    assert remedy(system(), chosen) == install
    assert remedy(system(packages={"onnxruntime-gpu": "1.17"}), chosen) == install
    both = system(packages={"onnxruntime": "1.20", "onnxruntime-gpu": "1.17"})
    assert remedy(both, chosen) == f"pip uninstall -y onnxruntime onnxruntime-gpu && {install}"
    assert remedy(system(packages={"onnxruntime": "1.20"}), stack(requirements=("numpy<2",))) == "pip install 'numpy<2'"
    assert remedy(system(), stack(runtime="c")) == "apt-get install gcc"
    assert remedy(system(), stack(runtime="tensorrt", jetpack="6.2")) == "it comes with JetPack 6.2"


# --- which target a machine is


@pytest.mark.parametrize("known", [item for item in TARGETS if item.device_tree], ids=lambda item: item.name)
def test_a_board_is_known_by_its_device_tree_and_nearest_memory(known):
    tree = known.device_tree
    same = [item for item in TARGETS if set(item.device_tree) == set(tree)]
    for item in same:
        seen = system(machine="aarch64", device_tree=tree, memory=int(item.memory.value * 0.93), jetson=Jetson())
        alike = [other for other in same if other.memory.value == item.memory.value]  # Super is a setting, not a board
        assert guess(seen, TARGETS) is min(alike, key=lambda other: other.name)


@pytest.mark.parametrize("known", [item for item in TARGETS if item.kind == "cpu" and not item.device_tree])
def test_a_processor_is_the_most_demanding_target_that_it_fulfils(known):
    flags = known.features
    found = guess(system(machine=known.machine, cpu=Cpu(flags=flags)), TARGETS)
    assert found is known
    if flags:
        less = guess(system(machine=known.machine, cpu=Cpu(flags=flags[:-1])), TARGETS)
        assert less is not known


def test_a_card_of_another_capability_or_a_foreign_jetson_is_no_target():
    assert guess(system(gpus=(Gpu("Tesla P40", "6.1", 24 * 10**9),)), TARGETS) is P40
    assert guess(system(gpus=(Gpu("Tesla P40", "", 24 * 10**9),)), TARGETS) is P40
    assert guess(system(gpus=(Gpu("Tesla P40", "7.0", 24 * 10**9),)), TARGETS) is None
    assert guess(system(gpus=(Gpu("Tesla P4", "6.1", 8 * 10**9),)), TARGETS) is not P40
    assert guess(system(jetson=Jetson(), cpu=Cpu(flags=("asimd",))), TARGETS) is None
    assert guess(system(), []) is None


def test_every_stack_of_every_target_says_how_to_get_it():
    for item in TARGETS:
        for chosen in item.stacks:
            said = remedy(system(), chosen)
            assert said, (item.name, chosen.name)
            spelt = said.lower().replace("_", "-")
            assert all(name in spelt for name in stacks.packages_of(chosen)), said
