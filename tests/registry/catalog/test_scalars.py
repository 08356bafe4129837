"""Scalars: the file is read piece by piece, whatever is in it, and curves become buckets."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from registry.catalog import scalars
from registry.catalog.scalars import Point, buckets, read_scalars, write_line
from registry.store.errors import Corrupt


def lines(*points: tuple[str, Point]) -> bytes:
    return b"".join(write_line(point, tag) for tag, point in points)


def everything(path: Path) -> dict[str, list[Point]]:
    """What repeated calls give, until the place stays."""
    found: dict[str, list[Point]] = {}
    place = -1
    after = 0
    while place != after:
        place = after
        points, after = read_scalars(path, place)
        for tag, part in points.items():
            found.setdefault(tag, []).extend(part)
    return found


def test_a_line_is_as_the_format_says(tmp_path: Path) -> None:
    line = write_line(Point(45, 1732690000.1, 0.26), "Training/Loss")
    assert line == b'{"s": 45, "t": 1732690000.1, "k": "Training/Loss", "v": 0.26}\n'
    path = tmp_path / "s"
    path.write_bytes(line)
    assert read_scalars(path) == ({"Training/Loss": [Point(45, 1732690000.1, 0.26)]}, len(line))


@given(
    st.lists(st.tuples(st.text(max_size=9), st.integers(-(2**53), 2**53), st.floats()), max_size=9), st.data()
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_point_comes_back_wherever_the_file_was_cut(
    tmp_path: Path, given: list[tuple[str, int, float]], data: st.DataObject
) -> None:
    points = [(tag, Point(step, 1.5, value)) for tag, step, value in given]
    whole = lines(*((tag, point) for tag, point in points))
    path = tmp_path / "s"
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    first, place = read_scalars(path)
    assert place == whole[:cut].rfind(b"\n") + 1
    path.write_bytes(whole)
    second, end = read_scalars(path, place)
    assert end == len(whole)
    wanted: dict[str, list[Point]] = {}
    for tag, point in points:
        wanted.setdefault(tag, []).append(point)
    found = {tag: [*first.get(tag, []), *second.get(tag, [])] for tag in {**first, **second}}
    assert repr(sorted(found.items())) == repr(sorted(wanted.items()))


GOOD = write_line(Point(1, 1.0, 2.0), "good")
ODD = [
    b"",
    b"not json",
    b"[1, 2]",
    b"7",
    b"null",
    b'{"s": 1, "t": 1.0, "k": "x"}',
    b'{"s": 1.5, "t": 1.0, "k": "x", "v": 1}',
    b'{"s": true, "t": 1.0, "k": "x", "v": 1}',
    b'{"s": 1, "t": "soon", "k": "x", "v": 1}',
    b'{"s": 1, "t": NaN, "k": "x", "v": 1}',
    b'{"s": 1, "t": 1, "k": 5, "v": 1}',
    b'{"s": 1, "t": 1, "k": ["x"], "v": 1}',
    b'{"s": 1, "t": 1, "k": "x", "v": "1"}',
    b'{"s": 1, "t": 1, "k": "x", "v": true}',
    b'{"s": 1, "t": 1, "k": "x", "v": {}}',
    b'{"s": 1, "t": 1, "k": "\\ud800", "v": 1}',
    b'{"s": 1, "t": 1, "k": "x", "v": 1' + b"0" * 400 + b"}",
    b'{"s": 1, "t": 1, "k": "x", "v": 1' + b"0" * 3900 + b"}",
    b'{"s": 99999999999999999999, "t": 1, "k": "x", "v": 1}',
    b'{"s": 1, "t": 1, "k": "' + b"x" * 5000 + b'", "v": 1}',
    b"[" * 4000,
    b'{"a":' * 800,
    b"\xff\xfe\x00",
    b"\0" * 100,
    b'{"s": 1, "t": 1, "k": "x", "v": 1}{"s": 1}',
]


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: odd[:40])
def test_a_line_that_is_no_point_is_passed_over(tmp_path: Path, odd: bytes) -> None:
    path = tmp_path / "s"
    path.write_bytes(GOOD + odd + b"\n" + GOOD)
    found, place = read_scalars(path)
    assert found == {"good": [Point(1, 1.0, 2.0)] * 2}
    assert place == path.stat().st_size


@given(st.binary(max_size=300), st.integers(-5, 400))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_and_any_place_are_harmless(tmp_path: Path, data: bytes, place: int) -> None:
    path = tmp_path / "s"
    path.write_bytes(data)
    _, after = read_scalars(path, place)
    assert after >= max(0, place)
    assert read_scalars(path, after)[1] >= after


def test_texts_stand_for_what_is_not_finite(tmp_path: Path) -> None:
    path = tmp_path / "s"
    values = [math.nan, math.inf, -math.inf]
    path.write_bytes(lines(*(("x", Point(i, 0.0, value)) for i, value in enumerate(values))))
    assert [json.loads(line)["v"] for line in path.read_text().splitlines()] == [
        "NaN",
        "Infinity",
        "-Infinity",
    ]
    assert repr([point.value for point in read_scalars(path)[0]["x"]]) == "[nan, inf, -inf]"


def test_a_large_file_is_read_in_pieces_of_bounded_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s"
    path.write_bytes(lines(*(("x", Point(i, 0.0, 0.5)) for i in range(5_000))))
    monkeypatch.setattr(scalars, "MOST_AT_ONCE", 10_000)
    first, place = read_scalars(path)
    assert 100 < len(first["x"]) < 300
    assert 9_000 < place <= 10_000
    assert [point.step for point in everything(path)["x"]] == list(range(5_000))
    with path.open("ab") as file:
        file.write(b"x" * 100_000 + b"\n" + GOOD)
    assert len(everything(path)["good"]) == 1


def test_a_line_without_an_end_costs_no_memory_and_does_not_stop_the_reader(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with path.open("wb") as file:
        file.truncate(1 << 30)
        file.seek(0, 2)
        file.write(b"\n" + GOOD)
    tracemalloc.start()
    found, place = read_scalars(path)
    assert tracemalloc.get_traced_memory()[1] < 50 << 20
    tracemalloc.stop()
    assert (found, place) == ({}, scalars.MOST_AT_ONCE)
    assert read_scalars(path, 1 << 30)[0] == {"good": [Point(1, 1.0, 2.0)]}


def test_links_and_pipes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "s").write_bytes(GOOD)
    (tmp_path / "link").symlink_to(tmp_path / "s")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("link", "pipe", "folder"):
        with pytest.raises(Corrupt):
            read_scalars(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        read_scalars(tmp_path / "none")


def test_buckets_keep_the_smallest_and_the_largest_value() -> None:
    points = [Point(i, float(i), math.sin(i)) for i in range(12_345)]
    points[777] = Point(777, 777.0, 50.0)
    points[778] = Point(778, 778.0, math.nan)
    found = buckets(points, 1_000)
    assert len(found) == 1_000
    assert (found[0].first, found[-1].last, found[-1].time) == (0, 12_344, 12_344.0)
    assert all(one.last < other.first for one, other in itertools.pairwise(found))
    assert max(bucket.high for bucket in found) == 50.0
    assert min(bucket.low for bucket in found) == min(point.value for point in points if point.value < 50)


def test_few_points_are_their_own_buckets() -> None:
    assert buckets([]) == []
    (one, none) = buckets([Point(1, 2.0, 3.0), Point(2, 3.0, math.nan)])
    assert one == (1, 1, 2.0, 3.0, 3.0)
    assert (math.isnan(none.low), math.isnan(none.high)) == (True, True)


def test_the_reader_loads_neither_torch_nor_tensorboard() -> None:
    program = (
        "import sys, registry.catalog.scalars; "
        "assert not {'torch', 'tensorboard', 'numpy'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
