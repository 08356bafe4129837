"""Names of places: what may be one, what it stands for, and the file that keeps them."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import Stepwise, in_child, kill_me

from registry import Registry
from registry.remote import names
from registry.remote.names import add_name, named_places, place_of, remove_name
from registry.store import durable
from registry.store.errors import Conflict, Corrupt, Invalid, NotFound, RegistryError, StorageError


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of names, which is not there yet, and an empty working directory."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "config" / "torch-registry" / "remotes.toml"


@pytest.mark.parametrize(
    ("place", "kept"),
    [
        ("s3://models/team/", "s3://models/team"),
        ("gs://models", "gs://models"),
        ("az://models/team", "az://models/team"),
        ("file:///srv/my models", "file:///srv/my%20models"),
        ("/srv/my models", "/srv/my models"),
        ('/srv/"quoted" \\ größe', '/srv/"quoted" \\ größe'),
    ],
)
def test_a_name_stands_for_a_place(place: str, kept: str) -> None:
    assert add_name("team.1", place) == kept
    assert add_name("team.1", place) == kept
    assert named_places() == {"team.1": kept}
    assert place_of("team.1") == kept
    assert remove_name("team.1") == kept
    assert named_places() == {}


def test_a_folder_is_kept_as_an_absolute_path(tmp_path: Path) -> None:
    assert add_name("backup", "../backup") == str(tmp_path / "backup")
    os.chdir("/")
    assert place_of("backup") == str(tmp_path / "backup")


def test_a_name_of_another_place_is_removed_first(file: Path) -> None:
    add_name("team", "s3://models/team")
    before = file.read_bytes()
    with pytest.raises(Conflict, match=r"team is s3://models/team already; .*registry remote remove team"):
        add_name("team", "s3://models/other")
    assert file.read_bytes() == before
    remove_name("team")
    add_name("team", "s3://models/other")


@pytest.mark.parametrize("name", ["", ".registry", "a/b", "s3://x", "-a", "a b", "x" * 129, "a\n", "größe"])
def test_what_would_be_taken_for_a_folder_or_a_url_is_no_name(name: str, file: Path) -> None:
    with pytest.raises(Invalid, match="cannot be the name of a place"):
        add_name(name, "s3://models/team")
    assert not file.exists()


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("s3://key:CANARY@models/x", "without keys"),
        ("gs://models/x?token=CANARY", "without keys"),
        ("az://models/x#CANARY", "without keys"),
        ("https://models.example.org", "no kind of place"),
        ("s3://", "names no bucket"),
        ("/srv/\x1b[31m", "control characters"),
        ("/srv/\udcff", "control characters"),
    ],
)
def test_a_place_that_is_malformed_or_holds_a_secret_is_refused(place: str, said: str, file: Path) -> None:
    with pytest.raises(Invalid, match=said) as refused:
        add_name("team", place)
    assert "CANARY" not in str(refused.value)
    assert not file.exists()


def test_a_folder_goes_before_a_name(file: Path) -> None:
    add_name("team", "s3://models/team")
    Path("team").mkdir()
    assert place_of("team") == "team"
    assert add_name("team", "s3://models/team") == "s3://models/team"
    Path("other").mkdir()
    with pytest.raises(Invalid, match="'other' is a folder here, and a folder goes before a name"):
        add_name("other", "s3://models/team")
    Path("team").rmdir()
    Path("team").touch()
    assert place_of("team") == "s3://models/team"


def test_what_is_no_place_is_an_error_that_lists_the_names() -> None:
    with pytest.raises(NotFound, match=r"no folder 'tema' here, .* registry --root tema init"):
        place_of("tema")
    with pytest.raises(NotFound, match=r"no place is called 'tema'; name a place with"):
        remove_name("tema")
    for name in ("team", "backup"):
        add_name(name, f"s3://models/{name}")
    with pytest.raises(
        NotFound, match=r"'tema' here, and no place is called so; the names are backup, team$"
    ):
        place_of("tema")
    with pytest.raises(NotFound, match=r"no place is called 'tema'; the names are backup, team$"):
        remove_name("tema")
    for number in range(10):
        add_name(f"n{number}", "/srv")
    with pytest.raises(NotFound, match=r"n8 and 2 more; see registry remote list$"):
        place_of("tema")
    for text in ("/srv/models", ".registry", "s3://models/x", "a/b"):
        assert place_of(text) == text


def test_folders_and_urls_need_no_names(file: Path) -> None:
    file.parent.mkdir(parents=True)
    file.write_text("damaged")
    for text in ("s3://models/x", "/srv/models", "."):
        assert place_of(text) == text


def test_versions_are_copied_and_repaired_by_name(tmp_path: Path) -> None:
    here, there = Registry(tmp_path / "r"), Registry(tmp_path / "backup")
    saved = here.save("net", {"model": {"w": torch.ones(1_000)}})
    add_name("backup", str(there.root))
    assert [copied.target for copied in here.copy_to("backup")] == ["net:v1"]
    assert Registry(there.root)["net"].id == saved.id
    (pack,) = here.root.glob("packs/*/*.safetensors")
    pack.unlink()
    assert here.repair("backup").tensors == 1
    assert here.verify().problems == ()
    for call in (here.copy_to, here.repair):
        with pytest.raises(NotFound, match=r"the names are backup$"):
            call("bakcup")
        # A path is never taken for a name.
        with pytest.raises(NotFound, match="there is no registry at bakcup"):
            call(Path("bakcup"))


# -- the file ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"x", "is no TOML"),
        (b"\xff", "is no TOML"),
        (b"a = " + b"[" * 30_000, "is no TOML"),
        (b"n = " + b"1" * 10_000, "is no TOML"),
        (b"# " + b"x" * (64 << 10), "has more than 65,536 bytes"),
        (b"[other]\n", r"expected names in a table \[remotes\]"),
        (b"remotes = 1\n", r"expected names in a table \[remotes\]"),
        (b"[remotes]\nteam = 1\n", "'team' is no name with a text"),
        (b"[remotes.team]\nurl = 'x'\n", "'team' is no name with a text"),
        (b"[remotes]\n'../x' = 's3://models'\n", "'../x' is no name"),
        (b"[remotes]\nteam = 's3://a:CANARY@models'\n", "team: a s3:// URL names bucket and prefix alone"),
        (b"[remotes]\nteam = 'https://CANARY@models'\n", "team: 'https' is no kind of place"),
        (b"[remotes]\nteam = 'models'\n", "team: 'models' is no place"),
        (b'[remotes]\nteam = "/srv/\\u001b[31m"\n', "team: .* is no place"),
    ],
)
def test_a_file_that_makes_no_sense_is_named_and_left_alone(text: bytes, said: str, file: Path) -> None:
    file.parent.mkdir(parents=True)
    file.write_bytes(text)
    for call in (
        named_places,
        lambda: place_of("team"),
        lambda: add_name("b", "/srv"),
        lambda: remove_name("team"),
    ):
        with pytest.raises(Invalid, match=said) as refused:
            call()
        assert str(refused.value).startswith(str(file))
        assert str(refused.value).isprintable()
        assert "CANARY" not in str(refused.value)
    assert file.read_bytes() == text


def test_something_else_than_a_file_is_named(file: Path) -> None:
    file.mkdir(parents=True)
    with pytest.raises(Corrupt, match="is a folder, not a regular file"):
        named_places()
    file.rmdir()
    os.mkfifo(file)
    with pytest.raises(Corrupt, match="is a pipe"):
        named_places()


def test_a_link_to_the_file_stays_one(file: Path, tmp_path: Path) -> None:
    file.parent.mkdir(parents=True)
    file.symlink_to(tmp_path / "dotfiles.toml")
    add_name("team", "s3://models/team")
    assert file.is_symlink()
    assert named_places() == {"team": "s3://models/team"}


def test_too_many_names_are_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "_LONGEST", 200)
    add_name("a", "/srv/" + "a" * 90)
    before = file.read_bytes()
    with pytest.raises(Conflict, match="would have more than 200 bytes; remove names"):
        add_name("b", "/srv/" + "b" * 90)
    assert file.read_bytes() == before


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config").touch()
    with pytest.raises(StorageError, match=r"config.*: Not a directory"):
        add_name("team", "s3://models/team")
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    add_name("team", "s3://models/team")
    assert (tmp_path / "home" / ".config" / "torch-registry" / "remotes.toml").exists()

    def homeless(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", homeless)
    with pytest.raises(StorageError, match=r"no home folder .* set XDG_CONFIG_HOME"):
        named_places()


def test_killed_at_any_step_it_is_whole_before_or_after(file: Path) -> None:
    def change(last: int, moment: str) -> None:
        durable.disk = Stepwise(lambda step, when, _: kill_me() if (step, when) == (last, moment) else None)
        add_name("new", "/srv/new")
        remove_name("old")

    seen: list[str] = []
    statuses = [1]
    while any(statuses):
        step, statuses = len(seen) // 3, []
        for moment in ("before", "half", "after"):
            shutil.rmtree(file.parent.parent, ignore_errors=True)
            file.parent.mkdir(parents=True)
            add_name("old", "s3://models/old")
            statuses.append(in_child(functools.partial(change, step, moment)))
            seen.append("".join(named_places()))
            add_name("after", "/srv/after")
    assert set(seen) == {"old", "newold", "new"}
    assert seen[-1] == "new"


def test_names_that_several_processes_add_at_once_are_all_kept() -> None:
    program = (
        "import sys; from registry.remote.names import add_name\n"
        "for i in range(20): add_name(f'{sys.argv[1]}{i}', '/srv')"
    )
    running = [subprocess.Popen([sys.executable, "-c", program, name]) for name in "abc"]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert set(named_places()) == {f"{name}{i}" for name in "abc" for i in range(20)}


def test_every_error_is_one_line() -> None:
    for call in (lambda: place_of("x"), lambda: add_name("a\nb", "/srv"), lambda: add_name("a", "s3://\n")):
        with pytest.raises(RegistryError) as refused:
            call()
        assert "\n" not in str(refused.value)
