"""Files that somebody made to do harm: each is refused with what is wrong, and the registry stays as it was."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from registry.files.importing import import_checkpoint
from registry.files.reading import read_checkpoint_file
from registry.registry import Registry
from registry.store import dtypes, header
from registry.store.errors import Invalid, NotFound, RegistryError, Unsupported


def files_of(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.fixture
def refused(tmp_path: Path) -> Iterator[Callable[[Path], RegistryError]]:
    """Imports a file that must be refused, in one harmless line, without a trace in the registry."""
    registry = Registry(tmp_path / "registry")
    before = files_of(registry.root)

    def check(path: Path) -> RegistryError:
        with pytest.raises(RegistryError) as caught:
            import_checkpoint(registry, read_checkpoint_file(path), "net")
        text = str(caught.value)
        assert text.isprintable(), text
        assert len(text) < 700
        return caught.value

    yield check
    assert files_of(registry.root) == before
    assert registry.names() == []


def framed(text: bytes | str, data: bytes = b"", length: int | None = None) -> bytes:
    text = text.encode() if isinstance(text, str) else text
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(start: int = 0, end: int = 4, dtype: str = "F32", shape: Any = (1,)) -> str:
    return json.dumps({"dtype": dtype, "shape": shape, "data_offsets": [start, end]})


def named(*pairs: tuple[str, str]) -> str:
    return "{" + ",".join(f"{json.dumps(name)}:{value}" for name, value in pairs) + "}"


ZEROS = bytes(4)
MALFORMED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the file is empty"),
    "seven bytes": (b"1234567", "too few"),
    "length only": (bytes(8), "too few"),
    "length beyond the file": (framed("{}", b"", 3), "claims 3 bytes but the file has only 10"),
    "length of all ones": (framed("{}", b"", (1 << 64) - 1), "at most"),
    "length of a gigabyte": (framed("{}", bytes(100), 1 << 30), "at most"),
    "no brace": (framed(" {}"), "does not start with"),
    "not JSON": (framed("{a}"), "not JSON"),
    "not UTF-8": (framed(b'{"\xff":1}'), "not UTF-8"),
    "not a number": (framed('{"a":NaN}'), "whole numbers"),
    "fraction": (framed('{"a":{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}}', ZEROS), "whole numbers"),
    "negative size": (framed(named(("a", entry(shape=[-1]))), ZEROS), "expected 0 to"),
    "negative offset": (framed(named(("a", entry(-4, 0))), ZEROS), "expected 0 to"),
    "offsets reversed": (framed(named(("a", entry(4, 0))), ZEROS), "malformed data_offsets"),
    "endless number": (framed('{"a":' + "9" * 5000 + "}"), "expected 0 to"),
    "nested lists": (framed('{"a":' + "[" * 100_000 + "]" * 100_000 + "}"), "nested too deep"),
    "nested dicts": (framed('{"a":' * 100_000 + "1" + "}" * 100_000), "nested too deep"),
    "name twice": (framed(named(("a", entry()), ("a", entry())), ZEROS), "names 'a' twice"),
    "name twice, spelled differently": (
        framed('{"a":' + entry() + ',"\\u0061":' + entry() + "}", ZEROS),
        "names 'a' twice",
    ),
    "dtype twice": (
        framed('{"a":{"dtype":"F32","dtype":"I32","shape":[1],"data_offsets":[0,4]}}', ZEROS),
        "names 'dtype' twice",
    ),
    "overlap": (framed(named(("a", entry()), ("b", entry())), ZEROS), "'b' overlaps"),
    "partial overlap": (framed(named(("a", entry(0, 4)), ("b", entry(2, 6))), bytes(6)), "'b' overlaps"),
    "hole": (framed(named(("a", entry()), ("b", entry(8, 12))), bytes(12)), "hole before it"),
    "hole at the start": (framed(named(("a", entry(4, 8))), bytes(8)), "hole before it"),
    "trailing bytes": (framed(named(("a", entry())), bytes(5)), "the tensors end at byte"),
    "cut short": (framed(named(("a", entry())), bytes(3)), "the tensors end at byte"),
    "shape and bytes differ": (framed(named(("a", entry(shape=[2]))), ZEROS), "does not fit"),
    "huge shape": (framed(named(("a", entry(shape=[1 << 62, 8]))), ZEROS), "malformed shape"),
    "huge shape of nothing": (
        framed(named(("a", entry(0, 0, shape=[1 << 62, 1 << 62, 0])))),
        "malformed shape",
    ),
    "shape beyond any float": (
        framed(named(("a", entry(dtype="F4", shape=[1 << 62] * 60))), ZEROS),
        "malformed shape",
    ),
    "a thousand dimensions": (framed(named(("a", entry(shape=[1] * 1000))), ZEROS), "malformed shape"),
    "unknown dtype": (framed(named(("a", entry(dtype="F\x1b[31m"))), ZEROS), "unknown dtype"),
    "half bytes": (framed(named(("a", entry(0, 1, "F4", [3]))), bytes(1)), "does not fit"),
    "metadata of numbers": (framed('{"__metadata__":{"a":1}}'), "not a table of strings"),
    "half a character": (framed('{"__metadata__":{"a":"\\ud800"}}'), "half a character"),
    "key too many": (
        framed('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"code":"x"}}', ZEROS),
        "exactly dtype, shape and data_offsets",
    ),
    "BOOL of 2": (
        framed(named(("a", entry(0, 4, "BOOL", [4]))), b"\0\1\2\0"),
        "'a' is BOOL but holds bytes other",
    ),
    "no tensors": (framed("{}"), "holds no tensors"),
    "F6": (framed(named(("a", entry(0, 3, "F6_E2M3", [4]))), bytes(3)), "F6_E2M3"),
    "F4 that torch cannot fold": (framed(named(("a", entry(0, 1, "F4", [2, 1]))), bytes(1)), "dtype F4"),
    "zip": (b"PK\x03\x04" + bytes(100), "rename it to end in .pt"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_safetensors_file_is_refused(
    tmp_path: Path, refused: Callable[[Path], RegistryError], case: str
) -> None:
    content, told = MALFORMED[case]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    error = refused(path)
    assert isinstance(error, Invalid | Unsupported)
    assert told in str(error)
    assert "bad.safetensors" in str(error)


@pytest.mark.parametrize(
    "name",
    [
        "..",
        "../../etc/passwd",
        "a/../b",
        "/etc/passwd",
        "a\\b",
        "a\0b",
        "x" * 5_000,
        "\x1b[2Jgone",
        "\u202egnp",
        "\ud800",
    ],
)
def test_a_tensor_name_that_could_do_harm_is_refused(
    tmp_path: Path, refused: Callable[[Path], RegistryError], name: str
) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(framed(named((name, entry())), ZEROS))
    assert "name" in str(refused(path))


_BOUNDED = """
import resource, sys, time
import registry.files.reading
from pathlib import Path
from registry.store.errors import RegistryError
size = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 30),) * 2)
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
try:
    registry.files.reading.read_checkpoint_file(Path(sys.argv[1]))
except RegistryError as error:
    print(error)
    sys.exit(7)
"""


def bounded(path: Path) -> str:
    """What a process with a gigabyte of room and a minute of time says of a file that it must refuse."""
    command = [sys.executable, "-c", _BOUNDED, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 7, done.stderr[-2000:]
    return done.stdout


def many_tensors(path: Path) -> str:
    path.write_bytes(framed("{" + ",".join(f'"{i}":{{}}' for i in range(1_200_000)) + "}"))
    return "more than 1000000 tensors"


def header_of_commas(path: Path) -> str:
    path.write_bytes(framed('{"a":[' + "1," * 15_000_000 + "1]}"))
    return "too large to be read safely"


def sparse_terabyte(path: Path) -> str:
    with path.open("wb") as file:
        file.write((1 << 39).to_bytes(8, "little") + b"{}")
        file.truncate(1 << 40)
    return "at most"


def compressed_archive(path: Path) -> str:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("archive/data.pkl", "w", force_zip64=True) as entry:
            for _ in range(1_500):
                entry.write(bytes(1 << 20))
        archive.writestr("archive/version", "3\n")
    return "compressed"


def archive_of(path: Path, pickled: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")


def buffer_by_length(path: Path) -> str:
    archive_of(path, b"\x80\x02c__builtin__\nbytearray\nI100000000000\n\x85R.")
    return "bytearray"


def legacy_buffer_by_length(path: Path) -> str:
    torch.save({}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes().replace(b"}q\x00.", b"c__builtin__\nbytearray\nI100000000000\n\x85R."))
    return "bytearray"


def laughing_lists(path: Path) -> str:
    tree: list[Any] = [0]
    for _ in range(60):
        tree = [tree, tree]
    torch.save({"model": {"w": torch.ones(1), "l": tree}}, path)
    return "unfold beyond"


def laughing_text(path: Path) -> str:
    torch.save({"w": torch.ones(1), "l": ["x" * (1 << 20)] * 10_000}, path)
    return "unfold beyond"


def list_in_itself(path: Path) -> str:
    tree: list[Any] = [torch.ones(1)]
    tree.append(tree)
    torch.save({"model": {"l": tree}}, path)
    return "unfold beyond"


def unfolding_tensor(path: Path) -> str:
    torch.save({"w": torch.ones(1).expand(1 << 40)}, path)
    return "unfold to over"


def storage_beyond_file(path: Path) -> str:
    torch.save({"w": torch.ones(4)}, path)
    content = path.read_bytes()
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        pickled = archive.read("big/data.pkl")
    larger = pickled.replace(b"K\x04t", b"\x8a\x06\0\0\0\0\0\x01t").replace(
        b"K\x04\x85", b"\x8a\x06\0\0\0\0\0\x01\x85"
    )
    assert larger.count(b"\x8a\x06") == 2
    archive_of(path, larger)
    return "not a readable file"


def nested_index(path: Path) -> str:
    path.write_text('{"weight_map":' + '{"a":' * 90_000 + "1" + "}" * 90_000 + "}")
    return "nested too deep"


def index_of_braces(path: Path) -> str:
    path.write_text('{"weight_map":[' + "{}," * 15_000_000 + "1]}")
    return "too large"


def sparse_index(path: Path) -> str:
    with path.open("wb") as file:
        file.truncate(1 << 40)
    return "larger than 64 MB"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (many_tensors, "big.safetensors"),
        (header_of_commas, "big.safetensors"),
        (sparse_terabyte, "big.safetensors"),
        (compressed_archive, "big.pt"),
        (buffer_by_length, "big.pt"),
        (legacy_buffer_by_length, "big.pt"),
        (laughing_lists, "big.pt"),
        (laughing_text, "big.pt"),
        (list_in_itself, "big.pt"),
        (unfolding_tensor, "big.pt"),
        (storage_beyond_file, "big.pt"),
        (nested_index, "model.safetensors.index.json"),
        (index_of_braces, "model.safetensors.index.json"),
        (sparse_index, "model.safetensors.index.json"),
    ],
)
def test_a_file_that_asks_for_too_much_is_refused_in_bounded_memory(
    tmp_path: Path, make: Callable[[Path], str], name: str
) -> None:
    told = make(tmp_path / name)
    assert told in bounded(tmp_path / name)


class Touch:
    """Unpickling it makes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


def zipped_pickle(path: Path, bait: Touch) -> None:
    torch.save({"model": {"w": torch.ones(1)}, "bait": bait}, path)


def legacy_pickle(path: Path, bait: Touch) -> None:
    torch.save({"model": {"w": torch.ones(1)}, "bait": bait}, path, _use_new_zipfile_serialization=False)


def plain_pickle(path: Path, bait: Touch) -> None:
    path.write_bytes(pickle.dumps(bait))


def text_pickle(path: Path, bait: Touch) -> None:
    path.write_bytes(pickle.dumps(bait, protocol=0))


@pytest.mark.parametrize("make", [zipped_pickle, legacy_pickle, plain_pickle, text_pickle])
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".pkl"])
def test_a_file_never_runs_code(
    tmp_path: Path, refused: Callable[[Path], RegistryError], make: Callable[[Path, Touch], None], suffix: str
) -> None:
    canary = tmp_path / "canary"
    path = tmp_path / f"bait{suffix}"
    make(path, Touch(canary))
    error = refused(path)
    assert not canary.exists()
    if suffix in (".pt", ".pth", ".ckpt", ".bin"):
        assert isinstance(error, Invalid if make is text_pickle else Unsupported)
        assert "posix" in str(error) or make in (plain_pickle, text_pickle)
        assert "torch.save(model.state_dict()" in str(error) or make is text_pickle
    pickle.loads(pickle.dumps(Touch(canary)))
    assert canary.exists()  # the bait is live


def test_a_shard_never_runs_code(tmp_path: Path, refused: Callable[[Path], RegistryError]) -> None:
    canary = tmp_path / "canary"
    folder = tmp_path / "hub"
    folder.mkdir()
    zipped_pickle(folder / "pytorch_model-1.bin", Touch(canary))
    index = {"weight_map": {"w": "pytorch_model-1.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    refused(folder)
    assert not canary.exists()


@pytest.mark.parametrize(
    "content", [b"PK\x03\x04", b"PK\x03\x04" + bytes(1000), b"\x80\x02.", b"hello", bytes(64)]
)
def test_what_is_no_torch_file_is_refused(
    tmp_path: Path, refused: Callable[[Path], RegistryError], content: bytes
) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    assert isinstance(refused(tmp_path / "a.pt"), Invalid | Unsupported)


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.3, 0.6, 0.99])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_torch_file_that_is_cut_short_is_refused(
    tmp_path: Path, refused: Callable[[Path], RegistryError], keep: float, zipped: bool
) -> None:
    path = tmp_path / "a.pt"
    torch.save({"w": torch.randn(1000)}, path, _use_new_zipfile_serialization=zipped)
    os.truncate(path, int(path.stat().st_size * keep))
    assert isinstance(refused(path), Invalid)


def hub(folder: Path) -> dict[str, Any]:
    """A sound folder of two shards, and its index."""
    folder.mkdir()
    for i in range(2):
        save_file({f"w{i}": torch.ones(2)}, folder / f"model-{i}.safetensors")
    return {"weight_map": {f"w{i}": f"model-{i}.safetensors" for i in range(2)}}


def write_index(folder: Path, index: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(
        index if isinstance(index, str) else json.dumps(index)
    )


@pytest.mark.parametrize(
    "shard",
    [
        "../outside.safetensors",
        "..",
        ".",
        "",
        "sub/model.safetensors",
        "sub\\model.safetensors",
        "C:model.safetensors",
        "a\0.safetensors",
        "\x1b[2J.safetensors",
        "x" * 300 + ".safetensors",
        "absolute",
        "link.safetensors",
        "chain.safetensors",
    ],
)
def test_an_index_cannot_point_outside_its_folder(
    tmp_path: Path, refused: Callable[[Path], RegistryError], shard: str
) -> None:
    folder = tmp_path / "hub"
    index = hub(folder)
    outside = tmp_path / "outside.safetensors"
    save_file({"w1": torch.ones(2)}, outside)
    (folder / "sub").mkdir()
    save_file({"w1": torch.ones(2)}, folder / "sub" / "model.safetensors")
    (folder / "link.safetensors").symlink_to(outside)
    (folder / "chain.safetensors").symlink_to("link.safetensors")
    index["weight_map"]["w1"] = str(outside) if shard == "absolute" else shard
    write_index(folder, index)
    error = refused(folder)
    assert isinstance(error, Invalid)
    assert "leaves the folder" in str(error) or "name" in str(error)


def test_a_link_within_the_folder_is_a_shard(tmp_path: Path) -> None:
    folder = tmp_path / "hub"
    write_index(folder, hub(folder))
    (folder / "model-1.safetensors").rename(folder / "blob")
    (folder / "model-1.safetensors").symlink_to("blob")
    checkpoint = import_checkpoint(Registry(tmp_path / "registry"), read_checkpoint_file(folder), "net")
    assert set(checkpoint.state_dict()) == {"w0", "w1"}
    assert set(checkpoint.files) == {"blob"}


def test_a_missing_shard_is_named(tmp_path: Path, refused: Callable[[Path], RegistryError]) -> None:
    folder = tmp_path / "hub"
    index = hub(folder)
    write_index(folder, index)
    (folder / "model-1.safetensors").unlink()
    error = refused(folder)
    assert isinstance(error, NotFound)
    assert "'model-1.safetensors', which is not there" in str(error)


def test_shards_hold_exactly_what_the_index_says(
    tmp_path: Path, refused: Callable[[Path], RegistryError]
) -> None:
    folder = tmp_path / "hub"
    index = hub(folder)
    write_index(folder, {"weight_map": {**index["weight_map"], "w2": "model-1.safetensors"}})
    assert "'w2' is in the shard 'model-1.safetensors', but it is not" in str(refused(folder))
    save_file({"w1": torch.ones(2), "more": torch.ones(1)}, folder / "model-1.safetensors")
    write_index(folder, index)
    assert "the shard 'model-1.safetensors' holds 'more'" in str(refused(folder))
    save_file({"w1": torch.ones(2), "w0": torch.ones(1)}, folder / "model-1.safetensors")
    assert "the shard 'model-1.safetensors' holds 'w0'" in str(refused(folder))


@pytest.mark.parametrize(
    "index",
    [
        '{"weight_map":{"w0":"model-0.safetensors","w0":"model-1.safetensors"}}',
        '{"weight_map":{},"weight_map":{"w0":"model-0.safetensors"}}',
        '{"weight_map":{}}',
        '{"weight_map":{"w0":1}}',
        '{"weight_map":{"w0":["model-0.safetensors"]}}',
        '{"weight_map":[]}',
        "[]",
        "{",
        "\x00",
        '{"weight_map":{"../w0":"model-0.safetensors"}}',
        '{"weight_map":{"w0":"config.json"}}',
        '{"weight_map":{"w0":"model.safetensors.index.json"}}',
    ],
)
def test_a_malformed_index_is_refused(
    tmp_path: Path, refused: Callable[[Path], RegistryError], index: str
) -> None:
    folder = tmp_path / "hub"
    hub(folder)
    (folder / "config.json").write_text("{}")
    write_index(folder, index)
    error = refused(folder)
    assert isinstance(error, Invalid)
    assert "index.json" in str(error)


@pytest.mark.parametrize(
    "config", ["[]", "{", '{"a":1,"a":2}', '{"$tensor":0}', '{"a":{"$float":1}}', "[" * 90_000, "1" * 5_000]
)
def test_a_malformed_config_is_refused(
    tmp_path: Path, refused: Callable[[Path], RegistryError], config: str
) -> None:
    folder = tmp_path / "hub"
    write_index(folder, hub(folder))
    (folder / "config.json").write_text(config)
    assert "config.json" in str(refused(folder))


def test_a_config_that_leaves_the_folder_is_not_read(
    tmp_path: Path, refused: Callable[[Path], RegistryError]
) -> None:
    folder = tmp_path / "hub"
    write_index(folder, hub(folder))
    (tmp_path / "secret.json").write_text('{"password": "x"}')
    (folder / "config.json").symlink_to("../secret.json")
    assert "leaves the folder" in str(refused(folder))


@pytest.mark.parametrize(
    "name",
    ["a.pt", "a.safetensors", "model.safetensors.index.json", "hub/model-0.safetensors", "hub/config.json"],
)
def test_a_pipe_is_refused_without_waiting(
    tmp_path: Path, refused: Callable[[Path], RegistryError], name: str
) -> None:
    folder = tmp_path / "hub"
    write_index(folder, hub(folder))
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    assert "not a regular file" in str(refused(folder if name.startswith("hub") else tmp_path / name))


def test_a_device_is_refused(tmp_path: Path, refused: Callable[[Path], RegistryError]) -> None:
    (tmp_path / "a.safetensors").symlink_to("/dev/zero")
    (tmp_path / "a.pt").symlink_to("/dev/zero")
    assert "not a regular file" in str(refused(tmp_path / "a.safetensors"))
    assert "not a regular file" in str(refused(tmp_path / "a.pt"))


CODES = [*dtypes.BY_CODE, "F4", "F6_E2M3", "F6_E3M2", "X9"]


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """Safetensors files, most of them nearly sound."""
    position = 0
    parts = []
    for i in range(draw(st.integers(0, 4))):
        code = draw(st.sampled_from(CODES))
        sizes = st.sampled_from([0, 1, 2, 3, 4, 8] * 8 + [1 << 31, 1 << 62, 10**19 - 1])
        shape = draw(st.lists(sizes, max_size=4))
        kind = dtypes.BY_CODE.get(code)
        bits = dtypes.ELEMENT_TYPES[kind].size * 8 if kind else {"F4": 4}.get(code, 6)
        size = 1
        for n in shape:
            size *= n
        size = size * bits // 8
        if size > 1 << 12:
            size = draw(st.sampled_from([0, 1]))
        start = position + draw(st.sampled_from([0] * 30 + [1, -1]))
        end = start + size + draw(st.sampled_from([0] * 30 + [1]))
        name = draw(st.sampled_from([f"t{i}", f"é{i}", f"a/{i}", f"{i} b"] * 5 + ["t0", ""]))
        parts.append((name, json.dumps({"dtype": code, "shape": shape, "data_offsets": [start, end]})))
        position = max(end, 0)
    if draw(st.booleans()):
        metadata = draw(
            st.dictionaries(st.text(max_size=3), st.text(max_size=3) | st.just("\ud800"), max_size=2)
        )
        parts.append(("__metadata__", json.dumps(metadata)))
    text = named(*draw(st.permutations(parts))) + draw(st.sampled_from([""] * 20 + [" ", "\n\t", "\0", "x"]))
    data = bytes(i % 251 for i in range(position))
    return framed(text, data + bytes(draw(st.sampled_from([0] * 20 + [1]))))


def mutated(content: bytes, changes: list[tuple[int, int]]) -> bytes:
    data = bytearray(content)
    for place, value in changes:
        data[place % len(data)] = value
    return bytes(data)


@pytest.mark.slow
@settings(max_examples=1_500)
@given(headers(), st.just([]) | st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=2))
def test_what_we_read_the_public_library_reads_alike(content: bytes, changes: list[tuple[int, int]]) -> None:
    content = mutated(content, changes)
    try:
        parsed = header.parse(content, len(content))
    except Invalid:
        return
    theirs = dict(safetensors.deserialize(content))
    assert set(theirs) == {entry.name for entry in parsed.entries}
    for item in parsed.entries:
        there = theirs[item.name]
        assert (there["dtype"], tuple(there["shape"])) == (item.code, item.shape)
        assert bytes(there["data"]) == content[item.start : item.end]


@settings(max_examples=1_000)
@given(st.binary(max_size=300))
def test_no_bytes_make_the_header_parser_fail_otherwise(junk: bytes) -> None:
    for content in (junk, framed(junk), framed(b"{" + junk + b"}")):
        with contextlib.suppress(Invalid):
            header.parse(content, len(content))
