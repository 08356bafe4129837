"""The coding of compaction: its speed, and the sizes that other lossless codings reach with the same bytes.

AdamW fine-tunes a ResNet18 on digits. A checkpoint is coded against the anchor, which is seven checkpoints older.
"""

from __future__ import annotations

import statistics
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard

from benchmarks.measure import Result, Scale, Section, Table, middle_half
from benchmarks.series import digit_batches, fine_tuned, trained
from registry.store import differences
from registry.store.parallel import in_parallel

Array = Any
Code = Callable[[Array, Array, Array], bytes]
"""Codes elements of a checkpoint, given the elements of the anchor and of the checkpoint before the anchor."""

DISTANCE = 7
"""Checkpoints from the anchor to the one that is coded."""


def measure(_: Path, scale: Scale) -> Section:
    """Measure the seconds that coding and decoding a gigabyte take, and compare codings in a table."""
    batches = digit_batches()
    states = list(islice(_copies(fine_tuned(trained(batches), batches, 1e-5)()), DISTANCE + 2))
    new, old, older = states[-1], states[1], states[0]
    kinds = {
        "parameters": [_joined(state, "parameters") for state in (new, old, older)],
        "parameters in bfloat16": [
            _joined(state, "parameters").to(torch.bfloat16) for state in (new, old, older)
        ],
        "first moments": [_joined(state, "exp_avg") for state in (new, old, older)],
        "second moments": [_joined(state, "exp_avg_sq") for state in (new, old, older)],
    }
    return Section(_speed(*kinds["parameters"][:2], scale.rounds), tables=[_comparison(kinds, scale)])


def _copies(states: Any) -> Any:
    for state in states:
        yield {
            "parameters": [v.clone() for v in state["model"].values() if v.is_floating_point()],
            **{
                name: [moments[name].clone() for moments in state["optimizer"]["state"].values()]
                for name in ("exp_avg", "exp_avg_sq")
            },
        }


def _joined(state: Mapping[str, Sequence[torch.Tensor]], name: str) -> torch.Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in state[name]])


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.view(torch.uint8).numpy())


def _run(jobs: Sequence[Any], work: Callable[[Any], None]) -> None:
    in_parallel(jobs, work, [differences.CHUNK] * len(jobs))


def _speed(new: torch.Tensor, old: torch.Tensor, rounds: int) -> list[Result]:
    data, base = _bytes(new), _bytes(old)
    back = bytearray(len(data))
    coding, decoding = [], []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        coded = differences.encode(data, base, item_size=4, run=_run)
        coding.append(time.perf_counter() - began)
        began = time.perf_counter()
        task = differences.Decoding(memoryview(coded), base, item_size=4, out=memoryview(back))
        _run(range(task.chunks), task.work)
        decoding.append(time.perf_counter() - began)
    assert back == data
    size = len(data) / 1e9

    def result(what: str, times: list[float], goal: float) -> Result:
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

    return [result("compaction: coding", coding, 1 / 0.8), result("compaction: decoding", decoding, 1.0)]


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


def _ours(data: bytes) -> bytes:
    return differences.compressor().compress(data)


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


def _whole(values: Array) -> list[bytes]:
    return [values.tobytes()]


CODINGS = (
    _coding("no anchor, zstd 1", step=None, split=_whole, pack=_zstd(1)),
    _coding("no anchor, byte planes, zstd 1", step=None, split=_planes, pack=_zstd(1)),
    _coding("exclusive or, zstd 1", step=_xor, split=_whole, pack=_zstd(1)),
    _coding("exclusive or, byte planes, zstd 1", step=_xor, split=_planes, pack=_zstd(1)),
    _coding("difference, zstd 1", step=_difference, split=_whole, pack=_zstd(1)),
    _coding(
        "difference, byte planes, zstd with few and long matches (ours)",
        step=_difference,
        split=_planes,
        pack=_ours,
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


def _comparison(kinds: Mapping[str, Sequence[torch.Tensor]], scale: Scale) -> Table:
    most = 16 if scale.quick else 64
    rows = []
    for coding in CODINGS:
        parts, total, seconds = [], 0, 0.0
        for tensors in kinds.values():
            unsigned = f"u{tensors[0].element_size()}"
            arrays = [np.frombuffer(_bytes(tensor), unsigned) for tensor in tensors]
            chunks = len(arrays[0]) // differences.CHUNK
            chosen = np.unique(np.linspace(0, chunks - 1, most, dtype=int))
            sizes: list[int] = []

            def work(
                i: int, arrays: Any = arrays, sizes: list[int] = sizes, code: Code = coding.code
            ) -> None:
                part = slice(i * differences.CHUNK, (i + 1) * differences.CHUNK)
                sizes.append(len(code(*(array[part] for array in arrays))))

            began = time.perf_counter()
            _run([int(i) for i in chosen], work)
            seconds += time.perf_counter() - began
            size = len(chosen) * differences.CHUNK * arrays[0].itemsize
            total += size
            parts.append(f"{sum(sizes) / size:.1%}")
        rows.append([coding.name, *parts, f"{total / 1e9 / seconds:.2f} GB/s"])
    return Table(
        f"other codings: the part of a checkpoint that is left, {DISTANCE} checkpoints after its anchor, "
        "and the speed of coding (plain numpy)",
        ["", *kinds, "coding"],
        rows,
    )
