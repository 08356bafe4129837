"""Repair from a second copy: by digest, whatever is damaged in either."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from registry import Registry
from registry.store import durable
from registry.store.errors import Corrupt, Invalid, NotFound, StorageError
from registry.store.pack import read_pack_info


def state(number: float, size: int = 3_000) -> dict[str, Any]:
    return {"model": {"w": torch.full((size,), float(number)), "backbone": torch.arange(size).float()}}


def value(registry: Registry, reference: str) -> float:
    return float(registry[reference].load()["model"]["w"][0])


def reopened(registry: Registry) -> Registry:
    registry.catalog.close()
    return Registry(registry.root, create=False)


def backed_up(registry: Registry, target: Path) -> Path:
    """A copy of the folder, as a user makes it while nothing uses it."""
    registry.catalog.close()
    shutil.copytree(registry.root, target)
    return target


def packs(root: Path) -> list[Path]:
    return sorted(root.glob("packs/*/*.safetensors"))


def change(path: Path, at: int) -> None:
    """Damage a byte of a file."""
    path.chmod(0o600)
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.chmod(0o600)
    os.truncate(path, path.stat().st_size - 100)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "header": lambda path: change(path, 30),
    "length": lambda path: change(path, 1),
    "middle": lambda path: change(path, 5_000),
    "end": lambda path: change(path, -1),
    "cut": cut,
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
    "link": lambda path: (path.unlink(), path.symlink_to("/etc/hostname")),
}


def damage(path: Path, kind: str) -> None:
    path.chmod(0o600)
    DAMAGE[kind](path)


def catalog_is_lost(root: Path) -> None:
    for path in root.glob("catalog.sqlite*"):
        path.unlink()


def is_whole(registry: Registry) -> bool:
    return registry.verify().problems == () and registry.catalog.problems() == []


@pytest.mark.parametrize("knows", ["knows", "has forgotten", "has noted it"])
@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_pack_is_put_back_as_it_was(
    registry: Registry, tmp_path: Path, kind: str, knows: str
) -> None:
    for number in (1, 2):
        registry.save("net", state(number))
    backup = backed_up(registry, tmp_path / "backup")
    before = {path: path.read_bytes() for path in packs(registry.root)}
    for path in before:
        damage(path, kind)
    if knows != "knows":
        catalog_is_lost(registry.root)
    again = reopened(registry)
    if knows == "has noted it":
        assert again.verify().problems
        catalog_is_lost(again.root)
        again = reopened(again)
    would = again.repair(backup, dry_run=True)
    assert (would.packs, would.problems) == (2, ())
    assert {path: path.read_bytes() for path in packs(registry.root) if not path.is_symlink()} != before
    found = again.repair(backup)
    assert (found.packs, found.tensors, found.problems) == (2, 0, ())
    assert {path: path.read_bytes() for path in packs(registry.root)} == before
    assert is_whole(again)
    assert [value(again, f"net:v{number}") for number in (1, 2)] == [1, 2]
    assert again.repair(backup) == again.repair(backup, dry_run=True)
    assert again.repair(backup).packs == 0


def test_padding_that_is_not_zero_is_put_back(registry: Registry, tmp_path: Path) -> None:
    registry.save("net", {"model": {"a": torch.ones(3), "b": torch.ones(5)}})
    backup = backed_up(registry, tmp_path / "backup")
    (path,) = packs(registry.root)
    before, (first, _) = path.read_bytes(), read_pack_info(path).tensors
    change(path, first.start + first.size + 1)
    again = reopened(registry)
    assert again.verify().problems
    assert again.repair(backup).packs == 1
    assert path.read_bytes() == before
    assert is_whole(again)


@pytest.mark.parametrize("kind", ["header", "middle", "missing"])
@pytest.mark.parametrize("noted", ["noted", "unnoted"])
def test_what_another_registry_has_in_other_packs_is_put_back(
    registry: Registry, tmp_path: Path, kind: str, noted: str
) -> None:
    other = Registry(tmp_path / "other")
    for number in (1, 2, 3):
        registry.save("net", state(number))
    registry.remove(["net:v3"])
    registry.copy_to(other)
    for path in packs(registry.root):
        damage(path, kind)
    again = reopened(registry)
    if noted == "noted":
        assert again.verify().problems
    found = again.repair(other)
    assert found.problems == ()
    assert is_whole(again)
    assert [value(again, f"net:v{number}") for number in (1, 2)] == [1, 2]
    # Of a pack whose header is there, the bytes are put in their places, as far as nothing else was in it.
    assert found.packs == (2 if kind == "middle" else 0)
    assert found.tensors == (0 if kind == "middle" else 3)
    if kind != "middle" and noted == "unnoted":
        # At once, so that a repair that is killed does not write them twice.
        made = [entry for line in again.catalog.journal.read() if (entry := line.entry)]
        last = next(entry for entry in reversed(made) if entry.records[-1]["op"] == "pack")
        assert {record["op"] for record in last.records} == {"damaged", "pack"}
    again.collect_garbage(grace=0)
    assert is_whole(again)
    again.save("net", state(1))
    assert value(again, "net") == 1


def test_two_copies_that_are_damaged_in_different_places_are_whole_together(
    registry: Registry, tmp_path: Path
) -> None:
    for number in (1, 2):
        registry.save("net", state(number))
    backup = backed_up(registry, tmp_path / "backup")
    sizes = {path.name: path.stat().st_size for path in packs(registry.root)}
    both = max(sizes, key=sizes.__getitem__)
    for path in packs(registry.root):
        # Of the larger pack each copy has another tensor.
        starts = [tensor.start for tensor in read_pack_info(path).tensors]
        if path.name == both:
            change(path, starts[0])
            change(backup / path.relative_to(registry.root), starts[1])
        else:
            damage(backup / path.relative_to(registry.root), "header")
    again = reopened(registry)
    found = again.repair(backup)
    assert (found.packs, found.problems) == (1, ())
    assert is_whole(again)
    assert Registry(backup).repair(again).packs == 2
    assert is_whole(Registry(backup))


@pytest.mark.damages
def test_what_neither_has_is_named_and_the_rest_put_back(registry: Registry, tmp_path: Path) -> None:
    for number in (1, 2):
        registry.save("net", state(number))
    registry.save("net", state(2) | {"more": {"x": torch.zeros(3)}})
    backup = backed_up(registry, tmp_path / "backup")
    digest = next(digest for path, *_, digest in registry["net:v2"].parameters() if path == "model/w")
    (place,) = registry.catalog.locate([digest]).values()
    registry.catalog.close()
    for path in packs(registry.root):
        damage(path, "missing" if path.stem == place.pack else "end")
    for path in packs(backup):
        if path.stem == place.pack:
            change(path, place.start)
    again = reopened(registry)
    found = again.repair(backup)
    (problem,) = found.problems
    assert problem.message == f"model/w: neither {again.place} nor {backup} has it whole"
    assert problem.checkpoints == ("net:v2", "net:v3")
    assert value(again, "net:v1") == 1
    assert torch.equal(again["net:v3"].load("more")["more"]["x"], torch.zeros(3))
    # It is noted, so that the next save writes it again.
    again.save("net", state(2))
    assert [value(again, f"net:v{number}") for number in (1, 2, 3, 4)] == [1, 2, 2, 2]
    assert is_whole(again)


def compacted(registry: Registry) -> list[torch.Tensor]:
    """Versions that are stored as differences from one another; returns their tensors."""
    torch.manual_seed(0)
    weights, saved = torch.randn(20_000), []
    for _ in range(4):
        weights = weights + 1e-4 * torch.randn(20_000)
        saved.append(weights.clone())
        registry.save("net", {"model": {"w": weights.clone()}})
    assert registry.compact()[0].packs
    registry.collect_garbage(grace=0)
    return saved


@pytest.mark.parametrize("kind", ["header", "middle", "cut", "missing"])
@pytest.mark.parametrize("whom", ["differences", "bases", "all"])
def test_differences_are_put_back_with_what_they_rest_on(
    registry: Registry, tmp_path: Path, kind: str, whom: str
) -> None:
    saved = compacted(registry)
    backup = backed_up(registry, tmp_path / "backup")
    before = {path: path.read_bytes() for path in packs(registry.root)}
    differing = {path for path in before if any(tensor.base for tensor in read_pack_info(path).tensors)}
    chosen = {"differences": differing, "bases": before.keys() - differing, "all": before.keys()}[whom]
    assert chosen
    for path in chosen:
        damage(path, kind)
    again = reopened(registry)
    found = again.repair(backup)
    assert (found.packs, found.problems) == (len(chosen), ())
    assert {path: path.read_bytes() for path in packs(registry.root)} == before
    assert is_whole(again)
    for number, expected in enumerate(saved, 1):
        assert torch.equal(again[f"net:v{number}"].load()["model"]["w"], expected)


@pytest.mark.parametrize("which", ["here", "there"])
def test_differences_are_put_back_from_a_registry_that_has_none_and_the_other_way(
    registry: Registry, tmp_path: Path, which: str
) -> None:
    other = Registry(tmp_path / "other")
    torch.manual_seed(0)
    weights, saved = torch.randn(20_000), []
    for _ in range(4):
        weights = weights + 1e-4 * torch.randn(20_000)
        saved.append(weights.clone())
        registry.save("net", {"model": {"w": weights.clone()}})
    registry.copy_to(other)
    one = registry if which == "here" else other
    one.compact()
    one.collect_garbage(grace=0)
    for path in packs(registry.root):
        damage(path, "header")
    again = reopened(registry)
    assert again.repair(other).problems == ()
    assert is_whole(again)
    for number, expected in enumerate(saved, 1):
        assert torch.equal(again[f"net:v{number}"].load()["model"]["w"], expected)


def test_cached_results_and_attached_files_are_put_back(registry: Registry, tmp_path: Path) -> None:
    def compute(n: int) -> torch.Tensor:
        return torch.arange(n)

    registry.cached(compute)(5_000)
    registry.save("net", state(1))
    (tmp_path / "net.onnx").write_bytes(b"onnx" * 1000)
    registry.attach("net", tmp_path / "net.onnx")
    backup = backed_up(registry, tmp_path / "backup")
    for path in [*packs(registry.root), *registry.root.glob("manifests/*/*")]:
        damage(path, "middle" if path.suffix == ".safetensors" and path.stat().st_size > 5_000 else "missing")
    again = reopened(registry)
    found = again.repair(backup)
    assert (found.packs, found.manifests, found.problems) == (3, 3, ())
    assert again.read_file("net", "net.onnx") == b"onnx" * 1000
    assert is_whole(again)


def test_a_doomed_pack_is_not_put_back(registry: Registry, tmp_path: Path) -> None:
    for number in (1, 2):
        registry.save("net", state(number))
    backup = backed_up(registry, tmp_path / "backup")
    again = reopened(registry)
    again.remove(["net:v2"])
    again.collect_garbage(grace=3_600)
    assert len(packs(registry.root)) == 2
    for path in packs(registry.root):
        damage(path, "missing")
    assert again.repair(backup).packs == 1
    assert len(packs(registry.root)) == 1
    assert is_whole(again)


def test_manifests_that_the_log_does_not_carry_come_from_the_second_copy(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("registry.log.entries.MAX_TEXT", 100)
    registry.save("net", state(1))
    registry.save("net", state(2))
    backup = backed_up(registry, tmp_path / "backup")
    for path, kind in zip(sorted(registry.root.glob("manifests/*/*")), ("middle", "missing"), strict=True):
        path.chmod(0o600)
        change(path, 50) if kind == "middle" else damage(path, kind)
    catalog_is_lost(registry.root)
    again = reopened(registry)
    found = again.repair(backup)
    assert (found.manifests, found.problems) == (2, ())
    assert is_whole(again)
    assert [value(again, f"net:v{number}") for number in (1, 2)] == [1, 2]


def lines(root: Path) -> list[bytes]:
    (path,) = root.glob("journal/*.log")
    return path.read_bytes().splitlines(keepends=True)


def write_lines(root: Path, found: list[bytes]) -> None:
    (path,) = root.glob("journal/*.log")
    path.write_bytes(b"".join(found))


def logged(registry: Registry, tmp_path: Path) -> Path:
    """A log of six entries, and a copy."""
    for number in (1, 2, 3, 4):
        registry.save("net", state(number))
    registry.set_alias("net:v2", "production")
    return backed_up(registry, tmp_path / "backup")


@pytest.mark.damages
def test_a_forged_manifest_is_not_taken(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("registry.log.entries.MAX_TEXT", 100)
    registry.save("net", state(1))
    backup = backed_up(registry, tmp_path / "backup")
    (path,) = registry.root.glob("manifests/*/*")
    damage(path, "missing")
    change(backup / path.relative_to(registry.root), 200)
    again = reopened(registry)
    found = again.repair(backup)
    assert found.manifests == 0
    assert found.problems[0].message.endswith(f"{backup} does not have it whole either")
    assert found.problems[0].checkpoints == ("net:v1",)
    assert not path.exists()


@pytest.mark.parametrize("lost", [(1,), (3,), (2, 3), (1, 2, 3, 4, 5)])
@pytest.mark.parametrize("kind", ["damaged", "missing"])
def test_entries_that_log_and_catalog_have_lost_come_from_a_copy_of_the_log(
    registry: Registry, tmp_path: Path, lost: tuple[int, ...], kind: str
) -> None:
    backup = logged(registry, tmp_path)
    whole = lines(registry.root)
    assert len(whole) == 6
    write_lines(
        registry.root,
        [
            line if seq not in lost else b"" if kind == "missing" else b"x" + line[1:]
            for seq, line in enumerate(whole, 1)
        ],
    )
    catalog_is_lost(registry.root)
    again = reopened(registry)
    with pytest.raises(Corrupt, match="cannot be read"):
        again.save("net", state(5))
    assert again.repair(backup, dry_run=True).entries == len(lost)
    found = again.repair(backup)
    assert (found.entries, found.problems) == (len(lost), ())
    assert lines(registry.root) == whole
    assert is_whole(again)
    assert again["net@production"].version == 2
    again.save("net", state(5))
    assert [value(again, f"net:v{number}") for number in range(1, 6)] == [1, 2, 3, 4, 5]


def test_a_damaged_entry_at_the_end_is_known_by_the_digest_in_its_line(
    registry: Registry, tmp_path: Path
) -> None:
    backup = logged(registry, tmp_path)
    whole = lines(registry.root)
    # The very last line counts as one that a crash cut short.
    write_lines(registry.root, [*whole[:4], b"x" + whole[4][1:], b"x" + whole[5][1:]])
    catalog_is_lost(registry.root)
    again = reopened(registry)
    assert again.repair(backup).entries == 1
    assert is_whole(again)
    assert value(again, "net") == 4
    assert lines(registry.root)[:5] == whole[:5]


def test_a_log_that_is_gone_comes_from_a_copy_that_names_what_is_here(
    registry: Registry, tmp_path: Path
) -> None:
    backup = logged(registry, tmp_path)
    stranger = Registry(tmp_path / "stranger")
    stranger.save("other", {"model": {"w": torch.ones(7)}})
    shutil.rmtree(registry.root / "journal")
    catalog_is_lost(registry.root)
    again = reopened(registry)
    assert again.repair(stranger).entries == 0
    assert again.repair(backup).entries == 6
    assert is_whole(again)
    assert again["net@production"].version == 2


def test_entries_of_another_log_are_not_taken(registry: Registry, tmp_path: Path) -> None:
    backup = logged(registry, tmp_path)
    # The copy was used: from entry 4 on it tells another history.
    write_lines(backup, lines(backup)[:3])
    catalog_is_lost(backup)
    used = Registry(backup)
    for number in (7, 8, 9):
        used.save("net", state(number))
    used.catalog.close()
    whole = lines(registry.root)
    write_lines(registry.root, [*whole[:3], b"x" + whole[3][1:], *whole[4:]])
    catalog_is_lost(registry.root)
    before = lines(registry.root)
    again = reopened(registry)
    found = again.repair(backup)
    assert found.entries == 0
    (problem,) = [problem.message for problem in found.problems if "entry 4 of the log" in problem.message]
    assert problem.endswith(f"{backup} does not have what belongs there either")
    assert lines(registry.root) == before
    again.catalog.close()
    write_lines(registry.root, whole)
    catalog_is_lost(registry.root)


def test_entries_that_were_accepted_as_lost_stay_lost(registry: Registry, tmp_path: Path) -> None:
    backup = logged(registry, tmp_path)
    whole = lines(registry.root)
    write_lines(registry.root, [*whole[:2], *whole[3:]])
    catalog_is_lost(registry.root)
    again = reopened(registry)
    again.rebuild(adopt=True)
    names = {version.name for version in again.versions("net")}
    assert again.repair(backup).entries == 0
    assert {version.name for version in again.versions("net")} == names


@pytest.mark.parametrize("damaged", ["pack", "header", "log"])
def test_a_repair_that_is_killed_at_any_step_is_repeated(
    registry: Registry, tmp_path: Path, damaged: str
) -> None:
    from support import Stepwise, in_child, kill_me

    for number in (1, 2):
        registry.save("net", state(number))
    other = Registry(tmp_path / "other")
    registry.copy_to(other)
    other.catalog.close()
    backup = backed_up(registry, tmp_path / "backup")
    catalog_is_lost(registry.root)
    if damaged == "log":
        whole = lines(registry.root)
        write_lines(registry.root, [*whole[:1], b"x" + whole[1][1:], *whole[2:]])
    else:
        for path in packs(registry.root):
            damage(path, "header" if damaged == "header" else "middle")
    source = other.root if damaged == "header" else backup
    at, ended = 0, False
    while not ended:
        root = tmp_path / f"try-{at}"
        shutil.copytree(registry.root, root)

        def run(root: Path = root, at: int = at) -> None:
            def step(count: int, moment: str, path: Path) -> None:
                if (count, moment) == (at, "before"):
                    kill_me()

            durable.disk = Stepwise(step)
            Registry(root, create=False).repair(source)

        ended = in_child(run) == 0
        again = Registry(root, create=False)
        assert again.repair(source).problems == ()
        assert is_whole(again)
        assert [value(again, f"net:v{number}") for number in (1, 2)] == [1, 2]
        again.collect_garbage(grace=0)
        assert is_whole(again)
        again.catalog.close()
        shutil.rmtree(root)
        # Every third step: most are like the one before.
        at += 3
    assert at > 6
    assert Registry(registry.root).repair(source).problems == ()


def test_a_repair_beside_a_save_loses_neither(registry: Registry, tmp_path: Path) -> None:
    for number in (1, 2):
        registry.save("net", state(number))
    other = Registry(tmp_path / "other")
    registry.copy_to(other)
    for path in packs(registry.root):
        damage(path, "header")
    program = (
        "import sys, torch; from registry import Registry; r = Registry(sys.argv[1]); print('in', flush=True)\n"
        "for n in range(20): r.save('net', {'model': {'w': torch.full((3000,), float(n % 5)), "
        "'backbone': torch.arange(3000).float()}})"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(registry.root)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert child.stdout is not None
    child.stdout.readline()
    again = reopened(registry)
    assert again.repair(other).problems == ()
    while child.poll() is None:
        assert again.repair(other).problems == ()
    assert child.returncode == 0, child.communicate()[1]
    again.repair(other)
    assert is_whole(again)
    assert [value(again, f"net:v{number + 3}") for number in range(20)] == [n % 5 for n in range(20)]
    assert [value(again, f"net:v{number}") for number in (1, 2)] == [1, 2]


def test_a_new_pack_that_gc_takes_before_it_is_known_is_written_again(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.save("net", state(1))
    other = Registry(tmp_path / "other")
    registry.copy_to(other)
    for path in packs(registry.root):
        damage(path, "header")
    again = reopened(registry)
    commit = again.catalog.commit

    def after_gc(compute: Any) -> Any:
        monkeypatch.setattr(again.catalog, "commit", commit)
        Registry(again.root).collect_garbage(grace=0)
        return commit(compute)

    monkeypatch.setattr(again.catalog, "commit", after_gc)
    found = again.repair(other)
    assert (found.tensors, found.problems) == (2, ())
    assert is_whole(again)


def hostile(root: Path, kind: str, tmp_path: Path) -> None:
    """Make a second copy one that somebody has forged."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret" * 2_000)
    for path in packs(root):
        if kind == "link":
            path.unlink()
            path.symlink_to(secret)
        elif kind == "other bytes":
            change(path, -1)
        elif kind == "other pack":
            Registry(tmp_path / "forger").save("net", state(9))
            path.chmod(0o600)
            path.write_bytes(packs(tmp_path / "forger")[0].read_bytes())
        elif kind == "huge header":
            path.chmod(0o600)
            path.write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
        elif kind == "pipe":
            path.unlink()
            os.mkfifo(path)
    if kind == "linked folder":
        (root / "packs").rename(tmp_path / "elsewhere")
        (root / "packs").symlink_to(tmp_path / "elsewhere")
    if kind == "names":
        for path in packs(root):
            path.rename(path.with_name("..\\..\\secret.safetensors"))


@pytest.mark.damages
@pytest.mark.parametrize(
    "kind", ["link", "other bytes", "other pack", "huge header", "pipe", "linked folder", "names"]
)
def test_nothing_of_a_hostile_second_copy_is_taken(registry: Registry, tmp_path: Path, kind: str) -> None:
    registry.save("net", {"model": {"w": torch.arange(2_000.0)}})
    backup = backed_up(registry, tmp_path / "backup")
    hostile(backup, kind, tmp_path)
    (path,) = packs(registry.root)
    change(path, -1)
    before = path.read_bytes()
    again = reopened(registry)
    found = again.repair(backup)
    (problem,) = found.problems
    assert "model/w: neither" in problem.message
    assert path.read_bytes() == before
    assert len(packs(registry.root)) == 1


def test_a_second_copy_that_is_none_is_refused(registry: Registry, tmp_path: Path) -> None:
    registry.save("net", state(1))
    (tmp_path / "empty").mkdir()
    for place in ("nowhere", "empty"):
        with pytest.raises(NotFound, match=f"no registry at .*{place}; give the folder or the URL"):
            registry.repair(tmp_path / place)
    for place in (registry.root, registry, os.path.relpath(registry.root)):
        with pytest.raises(Invalid, match="is the registry itself"):
            registry.repair(place)
    with pytest.raises(Invalid, match="without keys"):
        registry.repair("s3://key:secret@models/team")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_second_copy_that_cannot_be_read_is_refused(registry: Registry, tmp_path: Path) -> None:
    registry.save("net", state(1))
    backup = backed_up(registry, tmp_path / "backup")
    (backup / "packs").chmod(0)
    with pytest.raises(StorageError, match="permission denied"):
        registry.repair(backup)
    (backup / "packs").chmod(0o700)
