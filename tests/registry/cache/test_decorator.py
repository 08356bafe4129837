"""The dataset cache: what a key depends on, what a hit gives back, and who computes."""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import BaseModel
from support import in_child
from torch.utils.data import DataLoader, Dataset, TensorDataset

from registry import Registry, cached, register_result
from registry.log import entries
from registry.store.errors import Conflict, Invalid, NotFound, RegistryError, Unsupported


@pytest.fixture(autouse=True)
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.setenv("REGISTRY_ROOT", str(tmp_path / "r"))
    return Registry()


class Calls:
    """Counts the calls of what it wraps."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> int:
        self.count += 1
        return self.count


@pytest.fixture
def calls() -> Calls:
    return Calls()


# -- keys ----------------------------------------------------------------------------------------------------


def test_a_method_by_attributes_and_the_content_of_its_file(tmp_path: Path, calls: Calls) -> None:
    class LoadData:
        def __init__(self, max_len: int, colour: str = "red") -> None:
            self.max_len, self.colour = max_len, colour

        @cached(key=["max_len"])
        def data_process(self, file_path: str) -> torch.Tensor:
            """Doc."""
            calls()
            return torch.tensor([len(Path(file_path).read_text()), self.max_len])

    file = tmp_path / "a.txt"
    file.write_text("abc")
    assert LoadData(5).data_process(str(file)).tolist() == [3, 5]
    assert LoadData(5, "blue").data_process(file_path=str(file)).tolist() == [3, 5]
    assert calls.count == 1
    assert LoadData(6).data_process(str(file)).tolist() == [3, 6]
    file.write_text("abcd")
    assert LoadData(5).data_process(str(file)).tolist() == [4, 5]
    assert calls.count == 3
    file.write_text("abc")
    (tmp_path / "copy.txt").write_text("abc")
    for path in (file, tmp_path / "copy.txt", tmp_path / "." / "a.txt"):
        assert LoadData(5).data_process(path).tolist() == [3, 5]  # type: ignore[arg-type]
    assert calls.count == 3
    assert LoadData.data_process.__doc__ == "Doc."
    assert LoadData.data_process.__name__ == "data_process"


def test_positional_keyword_and_default_arguments_give_one_key(calls: Calls) -> None:
    @cached
    def f(a: int, b: int = 2, *rest: int, c: int = 3, **more: int) -> int:
        return calls()

    for value in (f(1), f(1, 2), f(a=1), f(1, b=2, c=3), f(b=2, a=1)):
        assert value == 1
    assert [f(1, 2, 5), f(1, c=4), f(1, d=1), f(2)] == [2, 3, 4, 5]
    with pytest.raises(TypeError):
        f()
    assert f.key(1) == f.key(a=1, b=2) != f.key(2)


class Colour(enum.Enum):
    RED = 1


@dataclasses.dataclass
class Point:
    x: int
    y: float


class Options(BaseModel):
    size: int = 3


def test_equal_parameters_give_one_key_and_others_another() -> None:
    @cached
    def f(x: Any) -> None: ...

    same = [
        (3, np.int64(3)),
        (0.5, np.float64(0.5)),
        ("a/b", Path("a/b")),
        ([1, 2], (1, 2)),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ({1, 2, 3}, {3, 2, 1}),
        (torch.ones(2), torch.ones(2)),
        (np.ones(2), np.ones(2)),
        (Point(1, 2.0), Point(1, 2.0)),
        (Options(), Options(size=3)),
        (float("nan"), float("nan")),
    ]
    for a, b in same:
        assert f.key(a) == f.key(b), a
    different = [
        *(3, "3", 0.5, [1, 2], [2, 1], {"a": 1}, {1, 2}, Colour.RED, None, True, b"a", "a", torch.float32),
        *(
            torch.ones(2),
            torch.ones(2, 1),
            torch.zeros(2),
            np.ones(3),
            Point(1, 2.0),
            Point(2, 2.0),
            Options(size=4),
        ),
    ]
    assert len({f.key(value) for value in different}) == len(different)


def test_a_key_is_the_same_in_every_process() -> None:
    program = (
        "from registry import cached\n@cached(version=2)\ndef f(x, y=1.5): ...\n"
        "print(f.key({'b': {3, 'x'}, 'a': [1, 2.5, None, 'ä']}))"
    )
    keys = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(keys) == 1
    assert re.fullmatch(r"[0-9a-f]{64}\n", keys.pop())


def test_the_version_and_the_source_count_if_they_are_asked_to() -> None:
    def f(x: int) -> int:
        return x

    def other(x: int) -> int:
        return x + 1

    other.__qualname__ = f.__qualname__
    assert cached(f).key(1) == cached(other).key(1)
    assert cached(f, code=True).key(1) != cached(other, code=True).key(1)
    assert len({cached(f, version=v).key(1) for v in (None, 1, 2, "a")}) == 4
    made: dict[str, Any] = {}
    exec("def g(x): return x", made)
    with pytest.raises(Invalid, match="the source of g cannot be read; use version="):
        cached(made["g"], code=True)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (lambda: 0, r"f: x is a function, which has no stable value; choose what .* key=\[...\]"),
        ([1, {"a": object()}], r"f: x\[1\]\['a'\] is a object"),
        (torch.ones(2).to_sparse(), "f: x cannot be part of a key"),
    ],
)
def test_a_parameter_without_a_stable_value_is_refused(value: Any, told: str) -> None:
    @cached
    def f(x: Any) -> None: ...

    f.__wrapped__.__qualname__ = "f"
    with pytest.raises(Invalid, match=told.replace("f: ", ".*f: ")):
        f(value)


def test_names_that_do_not_exist_are_errors_that_list_what_there_is() -> None:
    with pytest.raises(Invalid, match="has no parameter 'max_len'; it has size, path"):

        @cached(key=["max_len"])
        def f(size: int, path: str) -> None: ...

    class Loader:
        limit = 3

        def __init__(self) -> None:
            self.max_length = 5

        @cached(key=["max_len"])
        def load(self, size: int) -> None: ...

        @cached(key=["config.size"])
        def nested(self) -> None: ...

    with pytest.raises(
        Invalid, match=r"Loader no attribute 'max_len'; there are size, limit, load, max_length"
    ):
        Loader().load(3)
    with pytest.raises(Invalid, match="no attribute 'config'"):
        Loader().nested()
    with pytest.raises(Invalid, match="is not a function"):
        cached(3)


# -- files ---------------------------------------------------------------------------------------------------


def test_folders_count_by_their_sorted_content(tmp_path: Path, calls: Calls) -> None:
    @cached
    def f(folder: Path) -> int:
        return calls()

    (tmp_path / "d" / "sub").mkdir(parents=True)
    for name in ("b.txt", "a.txt", "sub/c.txt"):
        (tmp_path / "d" / name).write_text(name)
    assert f(tmp_path / "d") == f(tmp_path / "d") == 1
    (tmp_path / "d").rename(tmp_path / "e")
    assert f(tmp_path / "e") == 1
    (tmp_path / "e" / "sub" / "c.txt").rename(tmp_path / "e" / "sub" / "d.txt")
    assert f(tmp_path / "e") == 2
    (tmp_path / "e" / "new").write_text("")
    assert f(tmp_path / "e") == 3


def test_which_parameters_are_files(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("1")

    @cached
    def f(a_path: str, b: Path | None, name: str, many_path: Any = ()) -> None: ...

    @cached(files=["name"])
    def g(a_path: str, name: str) -> None: ...

    x = str(tmp_path / "x")
    f(x, None, "no file", [x, x])
    g("no file", x)
    for missing in (lambda: f("none", None, ""), lambda: f(x, Path("none"), ""), lambda: g("", "none")):
        with pytest.raises(NotFound, match=r"\w: \w+: none: there is no such file or folder"):
            missing()
    with pytest.raises(Invalid, match="a_path is a int, expected the path"):
        f(3, None, "")  # type: ignore[arg-type]
    with pytest.raises(Unsupported, match="is not a regular file"):
        f("/dev/null", None, "")


def test_a_file_that_did_not_change_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registry: Registry
) -> None:
    from registry.cache import contents

    file = tmp_path / "big"
    file.write_bytes(b"1" * 1000)
    reads = Calls()
    read = contents._read
    monkeypatch.setattr(contents, "_read", lambda path: (reads(), read(path))[1])
    contents.content_of(file, registry.root)
    contents.content_of(file, registry.root)
    assert reads.count == 2  # as it changed just now, a time stamp would not show the next change
    monkeypatch.setattr(contents, "_RECENT", -1.0)
    before = contents.content_of(file, registry.root)
    assert contents.content_of(file, registry.root) == before
    assert reads.count == 3
    status = file.stat()
    file.write_bytes(b"2" * 1000)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))  # same size, same time of change
    assert contents.content_of(file, registry.root).digest != before.digest
    for damaged in ("{", "[]", '{"": 3}', '{"": ["a", "b"]}'):
        next((registry.root / contents.FOLDER).iterdir()).unlink()
        (registry.root / contents.FOLDER / "x.json").write_text(damaged)
        assert len(contents.content_of(file, registry.root).digest) == 64


def test_what_changes_while_it_is_read_is_an_error_and_while_computing_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: Calls, caplog: pytest.LogCaptureFixture
) -> None:
    from registry.cache import contents

    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "a").write_text("1")
    read = contents._read

    def busy(path: Path) -> str:
        (folder / f"new{calls()}").write_text("x")
        return read(path)

    @cached
    def f(x_path: Path, act: bool = False) -> int:
        if act:
            (folder / "a").write_text(f"written meanwhile {calls()}")
        return calls()

    with monkeypatch.context() as patched:
        patched.setattr(contents, "_read", busy)
        with pytest.raises(Conflict, match="the folder changed while it was read; repeat"):
            f(folder)
    first = f(folder, act=True)
    assert "a file changed meanwhile; the result is not kept" in caplog.text
    assert f(folder, act=True) != first


# -- results -------------------------------------------------------------------------------------------------


@register_result
@dataclasses.dataclass
class Sample:
    image: torch.Tensor
    words: list[str]


@register_result
class Settings(BaseModel):
    size: int
    names: list[str] = []


RESULTS: dict[str, Any] = {
    "none": None,
    "tensor": torch.arange(6.0).reshape(2, 3),
    "dict": {"x": torch.ones(2), "n": 3, "s": "text", 4: (1.5, None, True)},
    "array": np.arange(5, dtype=np.int16),
    "dataset": TensorDataset(torch.arange(4.0), torch.arange(4)),
    "strings": [f"word {i}\n" for i in range(100)],
    "awkward strings": ["\n", "\0", "\x1f", "\u241e", "ä", "\ud800", ""] * 20,
    "tuple of strings": tuple("abcdefghijklmnopqrstuvwxyz"),
    "numbers": [list(range(100)), [i / 3 for i in range(50)], [True, False] * 20, [2**70] * 20],
    "nan": [float("nan"), float("inf"), -0.0] * 10,
    "tensors of one shape": [torch.full((2, 3), float(i)) for i in range(40)],
    "tensors of many shapes": [torch.arange(float(i)).reshape(-1, 1) for i in range(40)],
    "scalars": [torch.tensor(i) for i in range(40)],
    "mixed tensors": [torch.ones(2, dtype=d) for d in (torch.int8, torch.float64)] * 20,
    "arrays": [np.full((i, 2), i) for i in range(30)],
    "scalar arrays": [np.array(i) for i in range(30)],
    "large dict": {f"key {i}": torch.tensor([i]) for i in range(50)},
    "dict of dicts": {i: {"label": str(i), "x": [torch.ones(i)]} for i in range(50)},
    "dollar": {"$strings": 1, "$tensors": {"$x": 2}},
    "dataclass": Sample(torch.ones(2), ["a"] * 20),
    "model": {"s": Settings(size=3, names=["x"])},
    "empty": [[], {}, (), "", torch.zeros(0), b""],
    "bytes": b"x" * 1000,
}


def same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, TensorDataset):
        return same(a.tensors, b.tensors)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if dataclasses.is_dataclass(a):
        return same(vars(a), vars(b))
    if isinstance(a, float):
        return a.hex() == b.hex()
    return bool(a == b)


@pytest.mark.parametrize("name", RESULTS)
def test_a_hit_gives_back_what_was_returned(name: str, calls: Calls) -> None:
    @cached
    def f(name: str) -> Any:
        calls()
        return RESULTS[name]

    first, second = f(name), f(name)
    assert calls.count == 1
    assert first is RESULTS[name]
    assert same(first, second)


def test_long_lists_are_few_tensors(registry: Registry) -> None:
    @cached
    def f() -> Any:
        return (
            [str(i) for i in range(10_000)],
            [torch.tensor([i]) for i in range(10_000)],
            list(range(10_000)),
        )

    f()
    assert f.artifact().tensors == 3
    assert registry.store.manifest_path(f.artifact().id).stat().st_size < 2_000


@pytest.mark.parametrize(
    ("result", "told"),
    [
        ({"a": [1, {2, 3}]}, r"the result\['a'\]\[1\] is a set; return a sorted list instead"),
        ((i for i in range(3)), "the result is a generator; return a list instead"),
        ({"x": object()}, "result/x: a value of type builtins.object cannot be stored"),
        (Point(1, 2.0), "the result is a Point; register it: @register_result"),
        ([torch.ones(2).to_sparse()], "result/0: a tensor of layout torch.sparse_coo; convert it"),
    ],
)
def test_a_result_that_cannot_be_stored_says_which_part(result: Any, told: str, registry: Registry) -> None:
    @cached
    def f() -> Any:
        return result

    with pytest.raises(Unsupported, match=told):
        f()
    assert registry.artifacts.find() == []


def test_only_dataclasses_and_models_are_registered() -> None:
    with pytest.raises(Unsupported, match="is neither a dataclass nor a pydantic model"):
        register_result(Calls)


def test_a_hit_can_be_written_to_without_harm(calls: Calls) -> None:
    @cached
    def f() -> Any:
        calls()
        return torch.zeros(10_000), np.zeros(10_000)

    f()
    for found in f():
        found += 1
    assert all(float(part.sum()) == 0 for part in f())
    assert calls.count == 1


def test_a_hit_is_verified_once_always_or_never(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, calls: Calls
) -> None:
    from registry.cache import contents
    from registry.store import loading

    verify = loading.verify
    monkeypatch.setattr(loading, "verify", lambda *given: (calls(), verify(*given))[1])
    monkeypatch.setattr(contents, "_RECENT", -1.0)
    for how, expected in (("once", 1), (True, 3), (False, 0)):
        found = cached(lambda: torch.arange(100.0), verify=how, version=str(how))
        found()
        calls.count = 0
        for _ in range(3):
            found()
        assert calls.count == expected, how
    once = cached(lambda: torch.arange(100.0), version="once")
    once()
    for pack in (registry.root / "packs").rglob("*.safetensors"):
        os.utime(pack)
    calls.count = 0
    once()
    assert calls.count == 1


def test_an_exception_stores_nothing(calls: Calls, registry: Registry) -> None:
    @cached
    def f() -> int:
        if calls() == 1:
            raise ValueError("no")
        return 7

    with pytest.raises(ValueError, match="no"):
        f()
    assert registry.artifacts.find() == []
    assert f() == f() == 7
    assert calls.count == 2


def test_a_damaged_result_is_computed_again(
    calls: Calls, registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    @cached
    def f() -> torch.Tensor:
        calls()
        return torch.arange(1000.0)

    f()
    (pack,) = (registry.root / "packs").rglob("*.safetensors")
    other = registry.save("other", {"model": {"x": torch.ones(5), "y": torch.arange(1000.0)}})
    data = bytearray(pack.read_bytes())
    data[-5] ^= 1
    pack.chmod(0o644)
    pack.write_bytes(data)
    assert torch.equal(f(), torch.arange(1000.0))
    assert "it is computed again" in caplog.text
    assert torch.equal(f(), torch.arange(1000.0))
    assert calls.count == 2
    assert torch.equal(other.state_dict()["y"], torch.arange(1000.0))  # which shares the tensor
    assert Registry().verify().problems == ()


# -- kinds of functions --------------------------------------------------------------------------------------


def test_static_and_class_methods_and_functions_without_decoration(registry: Registry, calls: Calls) -> None:
    class A:
        size = 3

        @cached
        @staticmethod
        def static(x: int) -> int:
            return calls()

        @staticmethod
        @cached
        def inner(x: int) -> int:
            return calls()

        @classmethod
        @cached(key=["size", "x"])
        def of_class(cls, x: int) -> int:
            return calls()

    assert [A.static(1), A().static(1), A.inner(1), A.inner(1), A.of_class(1), A().of_class(x=1)] == [
        1,
        1,
        2,
        2,
        3,
        3,
    ]
    A.size = 4
    assert A.of_class(1) == 4
    plain = registry.cached(version=1)(sorted)
    assert plain([3, 1]) == plain([3, 1]) == [1, 3]
    assert [one.function for one in registry.artifacts.find()].count("sorted") == 1


def test_async_functions(calls: Calls) -> None:
    @cached
    async def f(x: int) -> int:
        await asyncio.sleep(0.05)
        return calls()

    async def several() -> list[int]:
        return list(await asyncio.gather(*(f(1) for _ in range(5))))

    async def inside() -> str:
        return f.artifact(1).function

    # A browser of other tests may leave a loop in this thread.
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(asyncio.run, several()).result() == [1] * 5
        assert pool.submit(asyncio.run, f(2)).result() == 2
        assert pool.submit(asyncio.run, inside()).result().endswith("f")
    assert f.artifact(1).function.endswith("f")


def test_a_registry_of_its_own(tmp_path: Path, calls: Calls) -> None:
    @cached(registry=tmp_path / "mine")
    def f() -> int:
        return calls()

    assert f() == f() == 1
    assert len(Registry(tmp_path / "mine").artifacts.find()) == 1
    assert Registry().artifacts.find() == []


def test_hits_and_misses_are_logged_with_their_times(caplog: pytest.LogCaptureFixture) -> None:
    @cached
    def load() -> int:
        time.sleep(0.02)
        return 1

    with caplog.at_level(logging.INFO):
        load()
        load()
    miss, hit = (record.message for record in caplog.records)
    assert re.search(r"cache miss .*load: processed in 0\.0[2-9]\d s", miss)
    assert re.search(r"cache hit .*load: loaded in 0\.\d{3} s", hit)


# -- several processes ---------------------------------------------------------------------------------------

PROGRAM = """
import logging, os, sys, time, torch
from registry import cached
logging.basicConfig(level="INFO", stream=sys.stdout, format="%(message)s")

@cached
def slow(x):
    with open("computed", "a") as file:
        file.write(f"{os.getpid()}\\n")
    time.sleep(float(os.environ.get("SECONDS", "0.5")))
    return torch.full((10,), float(x))

if __name__ == "__main__":
    print(slow(int(sys.argv[1])).sum().item())
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    (tmp_path / "program.py").write_text(PROGRAM)
    started: list[subprocess.Popen[str]] = []

    def run(x: int = 1, seconds: float = 0.5) -> subprocess.Popen[str]:
        started.append(
            subprocess.Popen(
                [sys.executable, "program.py", str(x)],
                cwd=tmp_path,
                env={**os.environ, "SECONDS": str(seconds)},
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


def wait_for(path: Path, lines: int = 1) -> None:
    for _ in range(1200):
        if path.exists() and len(path.read_text().splitlines()) >= lines:
            return
        time.sleep(0.05)
    raise AssertionError("nothing was computed")


def test_processes_that_miss_at_once_compute_once(start: Any, tmp_path: Path) -> None:
    outputs = [process.communicate(timeout=120)[0] for process in [start(seconds=1.5) for _ in range(3)]]
    assert len((tmp_path / "computed").read_text().splitlines()) == 1
    assert all(output.endswith("10.0\n") for output in outputs)
    assert sum("cache miss" in output for output in outputs) == 1
    assert sum("cache hit" in output for output in outputs) == 2


def test_one_that_waits_goes_on_when_the_other_is_killed(
    start: Any, tmp_path: Path, registry: Registry
) -> None:
    first = start(seconds=60)
    wait_for(tmp_path / "computed")
    second = start(seconds=0)
    while "another process computes it; waiting" not in second.stdout.readline():
        pass
    first.send_signal(signal.SIGKILL)
    assert second.communicate(timeout=60)[0].endswith("10.0\n")
    assert len((tmp_path / "computed").read_text().splitlines()) == 2
    assert len(registry.artifacts.find()) == 1
    assert registry.verify().problems == ()


class Images(Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> torch.Tensor:
        return squares(i % 2)[i]


@cached
def squares(which: int) -> torch.Tensor:
    return torch.arange(8.0) ** (which + 1)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_of_a_loader_use_it(context: str, registry: Registry) -> None:
    squares(0)
    found = torch.cat(list(DataLoader(Images(), num_workers=2, multiprocessing_context=context)))
    assert found.tolist() == [0, 1, 2, 9, 4, 25, 6, 49]
    assert len(registry.artifacts.find()) == 2


# -- in the registry -----------------------------------------------------------------------------------------


def test_a_run_records_the_artifact_as_its_dataset(registry: Registry) -> None:
    @cached
    def load(x: int) -> torch.Tensor:
        return torch.full((3,), float(x))

    load(1)
    with registry.run("net") as run:
        run.save(model=torch.nn.Linear(1, 1))
    assert registry["net"].provenance["dataset"] == load.artifact(1).id
    assert load.artifact(1).runs == ("net/run-1",)
    load(2)
    with registry.run("net", dataset=load.artifact(2).id) as run:
        run.save(model=torch.nn.Linear(1, 1))
    assert registry["net"].provenance["dataset"] == load.artifact(2).id
    with registry.run("net") as run:  # several, and nobody says which
        run.save(model=torch.nn.Linear(1, 1))
    assert "dataset" not in registry["net"].provenance
    assert registry["net"].provenance["artifacts"] == [load.artifact(1).id, load.artifact(2).id]


def test_equal_results_are_one_artifact_under_two_keys(registry: Registry) -> None:
    @cached
    def f(x: int) -> torch.Tensor:
        return torch.ones(5)

    f(1), f(2)
    a, b = registry.artifacts.find()
    assert a.id == b.id
    registry.artifacts.remove([a.key])
    assert torch.equal(f(int(b.record["parameters"]["x"])), torch.ones(5))


def test_garbage_collection_verification_and_rebuilding_respect_artifacts(
    registry: Registry, calls: Calls
) -> None:
    @cached
    def f(x: int) -> torch.Tensor:
        calls()
        return torch.full((100,), float(x))

    f(1), f(2)
    registry.collect_garbage(grace=0)
    assert registry.verify().problems == ()
    registry.rebuild()
    f(1), f(2)
    assert calls.count == 2
    assert {one.record["parameters"]["x"] for one in registry.artifacts.find()} == {1, 2}
    registry.artifacts.remove([f.key(1)])
    assert registry.collect_garbage(grace=0).packs == 1
    registry.rebuild()
    f(2)
    assert calls.count == 2
    assert [one.record["parameters"]["x"] for one in registry.artifacts.find()] == [2]


def test_clearing_by_age_and_use(registry: Registry) -> None:
    @cached
    def f(x: int) -> torch.Tensor:
        return torch.full((3,), float(x))

    for x in range(3):
        f(x)
    old = f.artifact(0)
    os.utime(registry.store.manifest_path(old.id), (time.time() - 40 * 86_400,) * 2)
    with registry.run("net", dataset=f.artifact(1).id):
        pass
    assert [one.key for one in registry.artifacts.clear(older_than=30 * 86_400)] == [old.key]
    assert [one.key for one in registry.artifacts.clear(unused=True)] == [f.key(2)]
    assert [one.key for one in registry.artifacts.find()] == [f.key(1)]
    assert len(registry.artifacts.clear()) == 1


def test_an_artifact_that_is_used_is_not_old(registry: Registry) -> None:
    @cached
    def f() -> int:
        return 1

    f()
    path = registry.store.manifest_path(f.artifact().id)
    os.utime(path, (time.time() - 40 * 86_400,) * 2)
    f()
    assert registry.artifacts.clear(older_than=30 * 86_400) == []


def test_a_result_too_large_for_the_log_comes_back_after_it_was_collected(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entries, "MAX_TEXT", 1000)
    calls = []

    @cached(registry=registry)
    def prepare(count: int) -> dict[str, Any]:
        calls.append(count)
        return {"text": "x" * count, "values": torch.ones(3)}

    prepare(5000)
    for number in (2, 3):
        assert registry.artifacts.clear()
        assert registry.collect_garbage(grace=0).packs
        for _ in range(2):
            assert len(prepare(5000)["text"]) == 5000
        assert len(calls) == number
    assert registry.verify().problems == ()
    registry.rebuild()
    assert len(prepare(5000)["text"]) == 5000
    assert len(calls) == 3


def test_a_pack_that_cannot_be_looked_at_is_an_error_that_names_it(
    registry: Registry, tmp_path: Path
) -> None:
    @cached(registry=registry)
    def prepare(count: int) -> torch.Tensor:
        return torch.ones(count)

    prepare(300)
    prepare(300)
    (pack,) = registry.store.packs.glob("*/*")
    for folder in (tmp_path, *tmp_path.parents):
        if "pytest" in str(folder) and folder.stat().st_uid == os.geteuid():
            folder.chmod(0o755)

    def ask() -> None:
        if os.geteuid() == 0:
            for path in (registry.root, *registry.root.rglob("*")):
                if path != pack.parent:
                    os.chown(path, 65_534, 65_534)
            pack.parent.chmod(0o700)
            os.setgroups([])
            os.setgid(65_534)
            os.setuid(65_534)
        else:
            pack.parent.chmod(0)
        with pytest.raises(RegistryError, match=f"packs/{pack.stem[:2]}: permission denied"):
            prepare(300)

    assert in_child(ask) == 0
    pack.parent.chmod(0o755)


def test_a_result_whose_manifest_has_no_file_was_used_when_it_was_made(calls: Calls) -> None:
    """As after a power cut."""

    @cached
    def load() -> int:
        return calls()

    load()
    registry = Registry()
    (one,) = registry.artifacts.find()
    registry.store.manifest_path(one.id).unlink()
    (one,) = registry.artifacts.find()
    assert time.time() - one.used < 600
    assert registry.artifacts.clear(older_than=3_600) == []
