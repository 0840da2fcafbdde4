"""The facts that Linux reports about the CPU decide whether a target is this machine."""

import platform

import pytest

from edgekit.targets import local, profile

INTEL = "processor\t: 0\nflags\t\t: fpu sse2 avx2 fma f16c avx512f avx512vl avx512_vnni avx512_bf16\n"
HASWELL = "processor\t: 0\nflags\t\t: fpu sse2 avx2 fma f16c\n"
PI = "processor\t: 0\nFeatures\t: fp asimd evtstrm crc32 asimdhp asimddp\n"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Return a function that makes this machine look like another."""

    def pretend(info, name="x86_64", board=""):
        (tmp_path / "cpuinfo").write_text(info)
        (tmp_path / "model").write_text(board + "\0")
        monkeypatch.setattr(local, "CPU_INFO", tmp_path / "cpuinfo")
        monkeypatch.setattr(local, "DEVICE_TREE", tmp_path / "model")
        monkeypatch.setattr(platform, "machine", lambda: name)

    return pretend


def found():
    return [name for name in profile.names() if local.is_here(profile.find(name))]


def test_the_profile_that_says_most_is_this_machine(machine):
    machine(INTEL)
    assert found() == ["x86-avx512"]
    assert local.here().name == "x86-avx512"


def test_an_older_cpu_is_not_the_newer_ones(machine):
    machine(HASWELL)
    assert found() == ["x86-avx2"]


def test_without_bfloat16_it_is_the_plainer_class(machine):
    machine(INTEL.replace(" avx512_bf16", ""))
    assert found() == ["x86-avx2"]


def test_a_board_is_known_by_its_name_too(machine):
    machine(PI, "aarch64", "Raspberry Pi 5 Model B Rev 1.0")
    assert found() == ["raspberry-pi-5"]
    machine(PI, "aarch64", "Some other board")
    assert found() == []


def test_another_architecture_is_nothing_of_this(machine):
    machine(INTEL, "aarch64")
    assert found() == []
    assert local.here() is None


def test_gpus_are_never_here(machine):
    machine(INTEL)
    assert not local.is_here(profile.find("rtx-3060-12gb"))


def test_a_system_that_does_not_tell_has_no_features(tmp_path):
    assert local.cpu_flags(tmp_path / "absent") == frozenset()


def test_ones_own_profile_of_this_cpu_is_here_too(machine, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    profile.user_folder().mkdir(parents=True)
    text = profile.path_of("x86-avx512").read_text().replace("x86-avx512", "my-box")
    (profile.user_folder() / "my-box.toml").write_text(text)
    machine(INTEL)
    assert found() == ["my-box", "x86-avx512"]
