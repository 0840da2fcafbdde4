"""The cache is one folder for one user: its path, its modes, and the folders that are refused."""

import os
import stat

import pytest

from edgekit import cache
from edgekit.errors import EdgekitError


def mode(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Set a cache that does not exist yet, and a umask with which new files would be open to everyone."""
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "parent" / "cache"))
    before = os.umask(0)
    yield tmp_path / "parent" / "cache"
    os.umask(before)


def test_the_environment_wins_over_the_users_cache_directory(tmp_path, monkeypatch):
    monkeypatch.delenv("EDGEKIT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.root() == tmp_path / "xdg" / "edgekit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.root().is_relative_to(tmp_path / "home")
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "mine"))
    assert cache.root() == tmp_path / "mine"


def test_folders_and_files_are_for_one_user(home):
    folder = cache.folder("engines")
    assert folder == home / "engines"
    cache.keep(folder / "x.bin", b"engine")
    assert (folder / "x.bin").read_bytes() == b"engine"
    assert [mode(path) for path in (home, folder, folder / "x.bin")] == [0o700, 0o700, 0o600]
    (folder / "y.bin").write_bytes(b"")
    assert mode(folder / "y.bin") == 0o666, "the twin: other files would be open to everybody"


def test_a_file_that_is_kept_again_is_replaced(home):
    path = cache.folder("engines") / "x.bin"
    for content in (b"first", b"2"):
        cache.keep(path, content)
        assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("which", ["root", "folder"])
@pytest.mark.parametrize("rights", [0o777, 0o770, 0o702])
def test_a_folder_that_others_can_write_to_is_refused(which, rights, home):
    folder = cache.folder("engines")
    wrong = home if which == "root" else folder
    wrong.chmod(rights)
    with pytest.raises(
        EdgekitError, match=rf"{wrong}: .*mode {rights:04o}.*run chmod go-w {wrong}, or set \$EDGEKIT_CACHE"
    ):
        cache.folder("engines")
    wrong.chmod(0o755)  # others may read it
    assert cache.folder("engines") == folder


def test_a_folder_of_another_user_is_refused(home, monkeypatch):
    cache.folder("engines")
    monkeypatch.setattr(os, "getuid", lambda: home.stat().st_uid + 1)
    with pytest.raises(EdgekitError, match=r"belongs to the user with id \d+.*chown, or set \$EDGEKIT_CACHE"):
        cache.folder("engines")


def test_a_link_to_a_folder_of_another_user_is_refused(home, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(0o777)
    home.parent.mkdir()
    home.symlink_to(elsewhere)
    with pytest.raises(EdgekitError, match="mode 0777"):
        cache.folder("engines")


def test_a_cache_that_cannot_be_written_is_named_with_the_remedy(home):
    home.parent.write_text("a file")
    with pytest.raises(EdgekitError, match=r"cannot be kept there.*set \$EDGEKIT_CACHE"):
        cache.folder("engines")


def test_a_full_disk_is_named_with_the_remedy(home, monkeypatch):
    def full(path, content, mode):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "write_file", full)
    with pytest.raises(EdgekitError, match=r"No space left on device.*has room"):
        cache.keep(cache.folder("engines") / "x", b"")


def test_a_folder_above_the_cache_that_others_can_write_to_is_refused(home):
    cache.folder("engines")
    home.parent.chmod(0o777)
    with pytest.raises(EdgekitError, match=rf"the folder {home.parent} above the cache has the mode 0777.*chmod go-w"):
        cache.folder("engines")
    home.parent.chmod(0o1777)  # like /tmp: others can only delete what is theirs
    cache.folder("engines")


def test_a_folder_above_the_target_of_a_link_is_checked_too(home, tmp_path):
    open_folder = tmp_path / "open"
    open_folder.mkdir(0o777)
    (open_folder / "cache").mkdir(0o700)
    home.parent.mkdir(0o700)
    home.symlink_to(open_folder / "cache")
    with pytest.raises(EdgekitError, match=f"the folder {open_folder} above the cache"):
        cache.folder("engines")


def test_a_file_is_read_if_nobody_else_could_have_written_it(home):
    path = cache.folder("engines") / "x.bin"
    assert cache.read(path) is None
    cache.keep(path, b"engine")
    assert cache.read(path) == b"engine"
    path.chmod(0o620)
    with pytest.raises(EdgekitError, match=r"x\.bin: the cached file has the mode 0620.*delete the file"):
        cache.read(path)


def test_a_file_of_another_user_is_refused(home, monkeypatch):
    path = cache.folder("engines") / "x.bin"
    cache.keep(path, b"engine")
    monkeypatch.setattr(os, "getuid", lambda: home.stat().st_uid + 1)
    with pytest.raises(EdgekitError, match=r"the cached file belongs to the user with id"):
        cache.read(path)


@pytest.mark.parametrize("other", ["link", "pipe", "folder"])
def test_what_is_no_plain_file_is_refused(other, home, tmp_path):
    path = cache.folder("engines") / "x.bin"
    (tmp_path / "elsewhere").write_bytes(b"evil")
    {
        "link": lambda: path.symlink_to(tmp_path / "elsewhere"),
        "pipe": lambda: os.mkfifo(path, 0o600),
        "folder": path.mkdir,
    }[other]()
    with pytest.raises(EdgekitError, match=r"x\.bin: the cached file"):
        cache.read(path)


def test_a_state_with_a_file_of_others_is_refused(home, tmp_path):
    state = cache.folder("passes") / "s.edge"
    state.mkdir(0o700)
    cache.keep(state / "weights", b"w")
    assert cache.check_tree(state) == state
    (state / "weights").chmod(0o606)
    with pytest.raises(EdgekitError, match=r"weights: the cached file has the mode 0606.*delete .*s\.edge"):
        cache.check_tree(state)
    (state / "weights").unlink()
    (state / "weights").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(EdgekitError, match="is a link"):
        cache.check_tree(state)
