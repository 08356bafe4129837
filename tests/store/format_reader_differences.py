"""What format_reader.py needs besides for compacted checkpoints; shares no code with the package either."""

import json
import math
import struct
from pathlib import Path

import numpy as np
import zstandard
from pcodec.wrapped import FileDecompressor

SIZES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
CODES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}


def by_class(coded, base, size):
    _, coder, classes, block = struct.unpack("<IBBI", coded[:10])
    old, count = np.frombuffer(base, f"<u{size}"), -(-len(base) // (size * block))
    limits, table = np.frombuffer(coded[10 : 9 + classes], np.uint8), 9 + classes
    lengths = np.frombuffer(coded[table : table + 4 * count * classes], "<u4").reshape(count, classes)
    table += lengths.nbytes
    reader, used = FileDecompressor.new(coded[table : table + 2])
    at, new = table + used, old.copy()
    assert coder == 2
    for i, row in enumerate(lengths):
        part = new[i * block : (i + 1) * block]
        exponents = (part << 1) >> (8 * size - 8)
        kinds = np.searchsorted(limits, exponents, side="right")
        for kind, length in enumerate(map(int, row)):
            if length:
                numbers = np.empty((kinds == kind).sum(), f"<i{size}")
                chunk, used = reader.chunk_decompressor(coded[at : at + length], f"i{8 * size}")
                chunk.read_page_into(coded[at + used : at + length], len(numbers), numbers)
                part[kinds == kind] += numbers.view(part.dtype)
            at += length
    return np.frombuffer(new.tobytes(), np.uint8)


def decoded(coded, base, size):
    if coded[:4] == bytes(4):
        return by_class(coded, base, size)
    chunk, count = struct.unpack("<II", coded[:8])
    kind, old = np.dtype(f"<u{size}"), np.frombuffer(base, f"<u{size}")
    lengths = np.frombuffer(coded[8 : 8 + 4 * count * size], "<u4").reshape(count, size)
    at, new = 8 + lengths.nbytes, []
    for i in range(count):
        part, folded = old[i * chunk : (i + 1) * chunk], 0
        for plane, length in enumerate(map(int, lengths[i])):
            data, at = coded[at : at + length], at + length
            if length not in (0, len(part)):
                data = zstandard.ZstdDecompressor().decompress(data)
            if length:
                folded = folded | (np.frombuffer(data, np.uint8).astype(kind) << kind.type(8 * plane))
        folded = np.zeros(len(part), kind) | folded
        new.append(((folded >> kind.type(1)) ^ (np.zeros_like(folded) - (folded & kind.type(1)))) + part)
    return np.frombuffer(np.concatenate(new).tobytes(), np.uint8)


def differences(root, plain):
    """Digest, type in a pack and bytes of the tensors that are stored as differences, or coded by themselves."""
    found = {}
    for path in Path(root, "packs").glob("*/*.safetensors"):
        data = np.memmap(path, mode="r")
        base = 8 + struct.unpack("<Q", data[:8].tobytes())[0]
        header = json.loads(data[8:base].tobytes())
        for name, entry in header.items():
            digest, _, other = name.partition(".")
            if len(name) in (69, 129):
                kind, _, shape = header["__metadata__"][name].partition(" ")
                size = SIZES[kind] * math.prod(map(int, filter(None, shape.split(","))))
                found[digest] = kind, other, size, data[base:][slice(*entry["data_offsets"])].tobytes()

    def whole(digest):
        if digest in plain:
            return plain[digest][1]
        kind, other, size, coded = found[digest]
        old = bytes(size) if other == "self" else whole(other).tobytes()
        return decoded(coded, old, SIZES[kind])

    for digest, (kind, *_) in found.items():
        yield digest, (CODES[kind], whole(digest))
