"""A reader of the format in docs/FORMAT.md that shares no code with the package."""

import json
import struct
from pathlib import Path

import numpy as np
from blake3 import blake3

KINDS = {"BOOL": "?", "BF16": "<u2", "C64": "<c8"} | {
    f"{c}{8 * n}": f"<{c.lower()}{n}" for c in "UIF" for n in (1, 2, 4, 8)
}


def packed(root):
    """Digest, type and shape in the file, and the pack with the range of bytes of every tensor."""
    for path in Path(root, "packs").glob("*/*.safetensors"):
        data = np.memmap(path, mode="r")
        base = 8 + struct.unpack("<Q", data[:8].tobytes())[0]
        assert blake3(data[:base].tobytes()).hexdigest() == path.stem, path
        for name, entry in json.loads(data[8:base].tobytes()).items():
            if len(name) == 64:
                yield name, (entry["dtype"], data[base:][slice(*entry["data_offsets"])])


def read(root, id):
    """The record and the components of a checkpoint; types that numpy lacks come as raw bytes or integers."""
    text = Path(root, "manifests", id[:2], f"{id}.json").read_bytes()
    manifest, where = json.loads(text), dict(packed(root))
    assert (blake3(text).hexdigest(), manifest["format"]) == (id, 1)

    def tensor(n):
        kind, shape, digest = manifest["tensors"][n]
        code, data = where[digest]
        line = f"{kind} [{','.join(map(str, shape))}]\n".encode()
        assert blake3(line + data.tobytes()).hexdigest() == digest
        raw = {"complex128": "<c16", "complex32": "<u4", "bcomplex32": "<u4"}.get(kind, KINDS.get(code, "u1"))
        return np.frombuffer(data.tobytes(), dtype=raw).reshape(shape)

    def value(node):
        if isinstance(node, list):
            return [value(item) for item in node]
        if not isinstance(node, dict) or not next(iter(node), "").startswith("$"):
            return {k: value(v) for k, v in node.items()} if isinstance(node, dict) else node
        tag, body = next(iter(node.items()))
        if tag == "$shards":
            whole = np.empty(node["shape"], tensor(body[0][1]).dtype)
            for at, n in body:
                whole[tuple(map(slice, at, np.add(at, manifest["tensors"][n][1], dtype=int)))] = tensor(n)
            return whole
        if tag in ("$tensor", "$array") or (tag == "$bytes" and isinstance(body, int)):
            return tensor(body).tobytes() if tag == "$bytes" else tensor(body)
        if tag in ("$float", "$complex"):
            return np.frombuffer(bytes.fromhex(body), ">f8" if tag == "$float" else ">c16")[0].item()
        plain = {"$bytes": bytes.fromhex, "$dict": lambda pairs: {value(k): value(v) for k, v in pairs}}
        scalar = {"$scalar": lambda pair: np.frombuffer(bytes.fromhex(pair[1]), dtype=pair[0])[0]}
        return (plain | scalar | {"$tuple": lambda items: tuple(value(items))}).get(tag, value)(body)

    return value(manifest["record"]), {name: value(node) for name, node in manifest["components"].items()}
