"""A recorded machine survives its JSON. A file with other content gives an error of one line."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from edgekit.doctor.system import Cpu, Gpu, Jetson, Library, Provider, System, from_dict, read
from edgekit.errors import EdgekitError

FULL = System(
    "aarch64",
    python="3.11.9",
    cpu=Cpu("x", "y", 4, ("a", "b")),
    memory=10,
    available=5,
    device_tree=("m", "c"),
    jetson=Jetson("36.4.3", "6.2", "MAXN", "locked"),
    pci_gpus=1,
    gpus=(Gpu("g", "8.7", 9, 8),),
    driver="580.1",
    cuda="13.0",
    system_libraries={"libnvinfer": "10.3.0"},
    environment={"CC": "clang"},
    packages={"numpy": "2"},
    libraries=(Library("l.so", "p", "1", (87,), (90,), ("libcudart.so.12",), ("libx.so",), "bad"),),
    providers=(Provider("P", ("P",), True, "why"),),
    compiler="cc",
)


@pytest.mark.parametrize("system", [FULL, System("x86_64"), replace(FULL, jetson=None)])
def test_json_and_back(system):
    assert from_dict(json.loads(json.dumps(system.to_dict())), "x") == system


def test_what_is_empty_is_not_written():
    assert System("x86_64").to_dict() == {"machine": "x86_64", "os": "Linux", "cpu": {"cores": 1}}


def test_a_report_is_read_as_the_system_in_it(tmp_path):
    path = tmp_path / "there.json"
    path.write_text(json.dumps({"checks": [], "system": FULL.to_dict()}))
    assert read(path) == FULL


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "not a recorded system"),
        ("{}", "key 'machine' is missing"),
        ('{"machine": "x", "gpu": 1}', "unknown key 'gpu'"),
        ('{"machine": "x", "memory": "big"}', "memory = 'big'; expected a whole number"),
        ('{"machine": "x", "jetson": {"clocks": "fast"}}', "unknown clocks 'fast'"),
        ('{"machine": "x", "libraries": [{"name": "l", "package": "p", "sms": ["61"]}]}', "expected a whole number"),
    ],
)
def test_a_file_that_is_no_system(content, message, tmp_path):
    path: Path = tmp_path / "there.json"
    path.write_text(content)
    with pytest.raises(EdgekitError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value)


def test_tensorrt_of_pip_goes_before_the_systems():
    system = System("x86_64", system_libraries={"libnvinfer": "8.6.1"})
    assert system.tensorrt == "8.6.1"
    assert replace(system, packages={"tensorrt-cu12": "10.3"}).tensorrt == "10.3"
