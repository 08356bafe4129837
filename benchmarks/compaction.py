"""The coding of compaction: its speed, and the sizes that other lossless codings reach with the same bytes.

AdamW trains two networks on, at a learning rate of 1e-5. A checkpoint is coded against an older one, its anchor.
"""

from __future__ import annotations

import statistics
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from pcodec import ChunkConfig, DeltaSpec, ModeSpec, standalone

from benchmarks.measure import Result, Scale, Section, Table, middle_half
from benchmarks.tasks import STEPS, Task, digits, fine_tuned, text
from registry.store import differences, planes
from registry.store.parallel import SMALL, Run, in_parallel

Array = Any
Code = Callable[[Array, Array, Array], bytes]
"""Codes elements of a checkpoint, given the elements of the anchor and of the checkpoint before the anchor."""

_CHUNK = 1 << 18
"""Elements that the codings are compared with at a time."""

NEAR, DISTANCE = 1, 7
"""Checkpoints from the anchor to those that are coded. The codings are compared over the longer distance."""

GOALS = (((1 / 1.45, 1 / 14), (1 / 1.35, 1 / 6.7)), ((1 / 1.55, 1 / 22), (1 / 1.42, 1 / 8.7)))
"""For each network, near the anchor and far from it: what parameters and moments may take, and parameters in bfloat16."""

Kinds = Mapping[str, Sequence[torch.Tensor]]
"""All elements of a kind: of the checkpoint that is coded, of its anchor, and of the one before the anchor."""


def measure(_: Path, scale: Scale) -> Section:
    """Measure what a difference takes, and the seconds for a gigabyte, and compare codings in tables."""
    results: list[Result] = []
    tables: list[Table] = []
    for task, both in ((digits(64), GOALS[0]), (text(), GOALS[1])):
        near, far = _kinds(task)
        for distance, kinds, (whole, halves) in ((NEAR, near, both[0]), (DISTANCE, far, both[1])):
            what = f"{task.name}: a difference over {STEPS * distance} steps"
            results += [
                _left(f"{what}, parameters and moments", kinds, _WHOLE, whole),
                _left(f"{what}, parameters in bfloat16", kinds, [_HALVES], halves),
            ]
        if not tables:
            results += _speed(*far["parameters"][:2], scale.rounds)
        tables.append(_comparison(task, far, scale))
    return Section(results, tables=tables)


_WHOLE = ("parameters", "first moments", "second moments")
_HALVES = "parameters in bfloat16"


def _kinds(task: Task) -> list[Kinds]:
    """What is coded near the anchor, and far from it."""
    # The anchor is the second checkpoint.
    wanted = (0, 1, 1 + NEAR, 1 + DISTANCE)
    states = enumerate(islice(fine_tuned(task, 1e-5), DISTANCE + 2))
    kept = {number: _parts(state) for number, state in states if number in wanted}
    found = []
    for distance in (NEAR, DISTANCE):
        chosen = [kept[i] for i in (1 + distance, 1, 0)]
        kinds = {name: [part[name] for part in chosen] for name in _WHOLE}
        found.append({**kinds, _HALVES: [part["parameters"].to(torch.bfloat16) for part in chosen]})
    return found


def _parts(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Copies of a checkpoint's parameters and moments, each kind as one tensor."""
    moments = state["optimizer"]["state"].values()
    return {
        "parameters": _joined(v for v in state["model"].values() if v.is_floating_point()),
        "first moments": _joined(one["exp_avg"] for one in moments),
        "second moments": _joined(one["exp_avg_sq"] for one in moments),
    }


def _joined(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def _left(what: str, kinds: Kinds, names: Sequence[str], goal: float) -> Result:
    """The part that the differences of some kinds take, as compaction codes them."""
    size = coded = zeros = same = count = 0
    for name in names:
        new, old, _ = kinds[name]
        coded += len(encode(bytes_of(new), bytes_of(old), item_size=new.element_size(), run=run))
        size += new.nbytes
        count += new.numel()
        zeros += int((new == 0).sum())
        same += int((new == old).sum())
    detail = f"{size / coded:.2f} times smaller; {zeros / count:.0%} of the elements zero, {same / count:.0%} unchanged"
    return Result(what, coded / size, goal, detail)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, in the order of its elements."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def run(jobs: Sequence[Any], work: Callable[[Any], None]) -> None:
    """Do some work as compaction does it, in threads."""
    in_parallel(jobs, work, [SMALL // 2] * len(jobs))


def encode(data: memoryview, base: memoryview, item_size: int, run: Run) -> bytes:
    """The difference of some floats from others, as compaction codes it."""
    return differences.encode(data, base, item_size=item_size, run=run, is_float=True)


def _speed(new: torch.Tensor, old: torch.Tensor, rounds: int) -> list[Result]:
    data, base = bytes_of(new), bytes_of(old)
    back = bytearray(len(data))
    coding, decoding = [], []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        coded = encode(data, base, item_size=4, run=run)
        coding.append(time.perf_counter() - began)
        began = time.perf_counter()
        task = differences.decoding(memoryview(coded), base, item_size=4, out=memoryview(back))
        run(range(task.chunks), task.work)
        decoding.append(time.perf_counter() - began)
    assert back == data
    size = len(data) / 1e9

    def result(what: str, times: list[float], goal: float | None) -> Result:
        seconds = [t / size for t in times[1:]]
        median = statistics.median(seconds)
        low, high = middle_half(seconds)
        return Result(
            f"{what} a gigabyte",
            median,
            goal=goal,
            detail=f"{1 / median:.2f} GB/s",
            unit="s",
            low=low,
            high=high,
        )

    alone, back_alone = _by_pcodec(new, old, rounds)
    return [
        result("compaction: coding", coding, 1 / 0.8),
        result("pcodec alone, on the differences as they stand: coding", alone, None),
        result("compaction: decoding", decoding, 1.0),
        result("pcodec alone, on the differences as they stand: decoding", back_alone, None),
    ]


def _by_pcodec(new: torch.Tensor, old: torch.Tensor, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds in which pcodec codes the differences and turns them back, in as many threads, and with nothing else to do."""
    difference = (new.view(torch.int32) - old.view(torch.int32)).numpy()
    parts = np.array_split(difference, -(-len(difference) // _CHUNK))
    config = ChunkConfig(compression_level=6, mode_spec=ModeSpec.classic(), delta_spec=DeltaSpec.no_op())
    coded: dict[int, bytes] = {}
    back = [np.empty_like(part) for part in parts]

    def code(i: int) -> None:
        coded[i] = standalone.simple_compress(parts[i], config)

    def turn_back(i: int) -> None:
        standalone.simple_decompress_into(coded[i], back[i])

    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds + 1):
        for work, times in zip((code, turn_back), seconds, strict=True):
            began = time.perf_counter()
            run(range(len(parts)), work)
            times.append(time.perf_counter() - began)
    assert np.array_equal(np.concatenate(back), difference)
    return seconds


@dataclass(frozen=True, slots=True)
class _Coding:
    """A coding and its name in the table."""

    name: str
    code: Code


def _xor(new: Array, old: Array, _: Array) -> Array:
    return new ^ old


def _difference(new: Array, old: Array, _: Array) -> Array:
    signed = (new - old).view(f"i{new.itemsize}")
    return ((signed << 1) ^ (signed >> (8 * new.itemsize - 1))).view(new.dtype)


def _extrapolated(new: Array, old: Array, older: Array) -> Array:
    """The difference from an extrapolation of the anchor, in whole numbers, so that it can be undone."""
    return _difference(new, old + (old - older) * new.dtype.type(DISTANCE), old)


def _planes(values: Array) -> list[bytes]:
    return [plane.tobytes() for plane in values.view(np.uint8).reshape(-1, values.itemsize).T]


def _bit_planes(values: Array) -> list[bytes]:
    bits = np.unpackbits(values.view(np.uint8).reshape(-1, values.itemsize), axis=1)
    return [np.packbits(plane).tobytes() for plane in bits.T]


def _zstd(level: int) -> Callable[[bytes], bytes]:
    return lambda data: zstandard.ZstdCompressor(level=level).compress(data)


def _few_and_long(data: bytes) -> bytes:
    return planes.compressor().compress(data)


def _huffman(data: bytes) -> bytes:
    coder = zlib.compressobj(1, strategy=zlib.Z_HUFFMAN_ONLY)
    return coder.compress(data) + coder.flush()


def _entropy(data: bytes) -> bytes:
    """As many bytes as an ideal coder takes that codes one byte at a time."""
    counts = np.bincount(np.frombuffer(data, np.uint8), minlength=256)
    shares = counts[counts > 0] / len(data)
    return bytes(int(-(shares * np.log2(shares)).sum() * len(data) / 8))


_Step = Callable[[Array, Array, Array], Array]


def _coding(
    name: str, step: _Step | None, split: Callable[[Array], list[bytes]], pack: Callable[[bytes], bytes]
) -> _Coding:
    def code(new: Array, old: Array, older: Array) -> bytes:
        values = new if step is None else step(new, old, older)
        return b"".join(min(pack(part), part, key=len) for part in split(values))

    return _Coding(name, code)


def _ours(new: Array, old: Array, _: Array) -> bytes:
    data, base = (memoryview(part).cast("B") for part in (new, old))
    return encode(data, base, item_size=new.itemsize, run=_one_by_one)


def _one_by_one(jobs: Sequence[Any], work: Callable[[Any], None]) -> None:
    for job in jobs:
        work(job)


def _whole(values: Array) -> list[bytes]:
    return [values.tobytes()]


CODINGS = (
    _coding("no anchor, zstd 1", step=None, split=_whole, pack=_zstd(1)),
    _coding("no anchor, byte planes, zstd 1", step=None, split=_planes, pack=_zstd(1)),
    _coding("exclusive or, zstd 1", step=_xor, split=_whole, pack=_zstd(1)),
    _coding("exclusive or, byte planes, zstd 1", step=_xor, split=_planes, pack=_zstd(1)),
    _coding("difference, zstd 1", step=_difference, split=_whole, pack=_zstd(1)),
    _Coding("difference, classes by the anchor's exponents, pcodec (ours)", _ours),
    _coding(
        "difference, byte planes, zstd with few and long matches (ours for float64)",
        step=_difference,
        split=_planes,
        pack=_few_and_long,
    ),
    _coding("difference, byte planes, zstd 1", step=_difference, split=_planes, pack=_zstd(1)),
    _coding("difference, byte planes, zstd 3", step=_difference, split=_planes, pack=_zstd(3)),
    _coding("difference, byte planes, zstd 9", step=_difference, split=_planes, pack=_zstd(9)),
    _coding("difference, byte planes, Huffman only", step=_difference, split=_planes, pack=_huffman),
    _coding("difference, bit planes, zstd 1", step=_difference, split=_bit_planes, pack=_zstd(1)),
    _coding(
        "difference from an extrapolation, byte planes, zstd 1",
        step=_extrapolated,
        split=_planes,
        pack=_zstd(1),
    ),
    _coding(
        "difference, byte planes, an ideal coder (only a bound)",
        step=_difference,
        split=_planes,
        pack=_entropy,
    ),
)


def _comparison(task: Task, kinds: Kinds, scale: Scale) -> Table:
    most = 8 if scale.quick else 32
    rows = []
    for coding in CODINGS:
        parts, total, seconds = [], 0, 0.0
        for tensors in kinds.values():
            unsigned = f"u{tensors[0].element_size()}"
            arrays = [np.frombuffer(bytes_of(tensor), unsigned) for tensor in tensors]
            chunks = len(arrays[0]) // _CHUNK
            chosen = np.unique(np.linspace(0, chunks - 1, most, dtype=int))
            sizes: list[int] = []

            def work(
                i: int, arrays: Any = arrays, sizes: list[int] = sizes, code: Code = coding.code
            ) -> None:
                part = slice(i * _CHUNK, (i + 1) * _CHUNK)
                sizes.append(len(code(*(array[part] for array in arrays))))

            began = time.perf_counter()
            run([int(i) for i in chosen], work)
            seconds += time.perf_counter() - began
            size = len(chosen) * _CHUNK * arrays[0].itemsize
            total += size
            parts.append(f"{sum(sizes) / size:.1%}")
        rows.append([coding.name, *parts, f"{total / 1e9 / seconds:.2f} GB/s"])
    return Table(
        f"other codings, {task.name}: the part of a checkpoint that is left, {STEPS * DISTANCE} steps after its anchor, "
        "and the speed of coding (plain numpy)",
        ["", *kinds, "coding"],
        rows,
    )
