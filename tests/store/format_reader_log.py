"""What format_reader.py needs besides to find checkpoints by name; shares no code with the package either."""

import json
from pathlib import Path

from blake3 import blake3


def entries(root):
    """The entries of the log, checked: digests, numbers and the chain."""
    seq, prev = 0, "0" * 64
    for path in sorted(Path(root, "journal").glob("*.log")):
        for line in path.read_bytes().splitlines(keepends=True):
            text, _, own = line.rstrip(b"\n").rpartition(b"\t")
            if not line.endswith(b"\n") or blake3(text).hexdigest() != own.decode():
                return  # The last one, which a crash cut short.
            entry = json.loads(text)
            assert (entry["seq"], entry["prev"]) == (seq + 1, prev)
            seq, prev = entry["seq"], own.decode()
            yield entry


def names(root):
    """The ids of versions and aliases by reference, the texts of manifests by id, and the packs that count."""
    ids, aliases, texts, packs = {}, {}, {}, set()
    for entry in entries(root):
        for record in entry["records"]:
            op = record["op"]
            if op == "publish":
                ids[f"{record['model']}:v{record['version']}"] = record["id"]
            elif op == "remove":
                ids = {name: found for name, found in ids.items() if found != record["id"]}
                aliases = {name: found for name, found in aliases.items() if found != record["id"]}
            elif op == "alias":
                aliases[f"{record['model']}@{record['alias']}"] = record["id"]
            elif op == "unalias":
                del aliases[f"{record['model']}@{record['alias']}"]
            elif op == "pack":
                packs.add(record["digest"])
            elif op in ("replace", "doom"):
                packs -= {record.get("old"), *record.get("packs", ())}
            if "manifest" in record:
                texts[record["id"]] = record["manifest"]
    return {**ids, **aliases}, texts, packs
