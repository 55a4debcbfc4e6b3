"""Where compiled kernels are kept, and whose: a library that another user could have put there is not loaded."""

import os
import shutil
from pathlib import Path

import pytest

from sgformer.backends.native import build

pytestmark = pytest.mark.skipif(
    not hasattr(os, "getuid") or shutil.which("g++") is None, reason="needs a C++ compiler, and owners of files"
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The cache folder of a library of one function, `answer`, that gives 42."""
    source = tmp_path / "source/kernels.cpp"
    source.parent.mkdir()
    source.write_text('extern "C" int answer() { return 42; }')
    monkeypatch.setattr(build, "SOURCE", source)
    monkeypatch.setattr(build, "declare", lambda library: (library.answer, library)[1])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home/cache"))
    return tmp_path / "home/cache/sgformer"


def answer():
    return build.library.__wrapped__().answer()


def planted(cache, function="answer", result=13):
    """A library in the cache under the right name; returns the file."""
    assert answer() == 42
    (file,) = cache.iterdir()
    other = cache.parent / "other.cpp"
    other.write_text(f'extern "C" int {function}() {{ return {result}; }}')
    assert os.system(f"g++ -shared -fPIC -o {file} {other}") == 0
    file.chmod(0o700)
    return file


def test_what_is_the_users_own_is_loaded(cache):
    planted(cache)
    assert answer() == 13
    assert cache.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("which", ["folder", "parent", "file", "target of a link"])
def test_what_others_can_write_is_not_loaded(cache, which, caplog):
    file = planted(cache)
    if which == "target of a link":
        outside = cache.parents[2] / "outside"
        cache.rename(outside)
        cache.symlink_to(outside)
    {"folder": cache, "parent": cache.parent, "file": file, "target of a link": cache}[which].chmod(0o777)
    before = file.read_bytes()
    assert answer() == 42
    if which == "file":  # which the user's own library replaces
        assert answer() == 42 and file.stat().st_mode & 0o777 == 0o700
    else:
        assert file.read_bytes() == before and [*cache.iterdir()] == [file]
        assert f"{cache}: not loaded from" in caplog.text


def test_what_belongs_to_another_user_is_not_loaded(cache, monkeypatch):
    planted(cache)
    own = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: own + 1)
    assert build.foreign_part(cache) is not None
    assert answer() == 42


def test_a_sticky_folder_of_all_holds_private_ones(cache):
    planted(cache)
    cache.parent.chmod(0o1777)
    assert build.foreign_part(cache) is None and answer() == 13
    cache.chmod(0o1777)
    assert build.foreign_part(cache) == cache and answer() == 42


def test_a_group_is_someone_else_unless_it_is_the_users_own(cache, monkeypatch):
    import grp
    import pwd

    planted(cache)
    cache.chmod(0o770)
    user = pwd.getpwuid(os.getuid()).pw_name
    for name, members, expected in ((user, [], None), (user, [user], None), (user, ["eve"], cache), ("all", [], cache)):
        monkeypatch.setattr(grp, "getgrgid", lambda gid, group=(name, "x", 1, members): grp.struct_group(group))
        assert build.foreign_part(cache) == expected, (name, members)


def test_a_library_without_the_functions_is_made_anew(cache):
    planted(cache, "another")
    assert answer() == 42 and answer() == 42


def test_a_relative_cache_is_ignored(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "own"))
    assert answer() == 42
    assert not Path("relative").exists() and len([*Path("own/.cache/sgformer").iterdir()]) == 1
    monkeypatch.setenv("HOME", "relative")
    assert answer() == 42 and not Path("relative").exists()
