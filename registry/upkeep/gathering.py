"""Gathering: the bytes of a tensor, or of a whole pack, by digest, from whichever of several copies has them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence

from registry.catalog.lookups import Query
from registry.store import differences, header, heads
from registry.store.digest import tensor_digest
from registry.store.dtypes import ELEMENT_TYPES, byte_count
from registry.store.errors import Corrupt
from registry.store.manifest import TensorInfo
from registry.store.pack import PackedTensor
from registry.upkeep.second_copies import Head, SecondCopy, head_of

_MAX_CHAIN = 8
"""How many differences may lie on one another."""


class Lost(Exception):
    """No copy has the bytes of a tensor. Never reaches users."""


class Gathering:
    """Finds bytes by digest. Whatever it gives has the digest that was asked for.

    Args:
        query: asks the catalog where tensors lie.
        copies: of the registry's packs; the last one may have the tensors in packs of other names, too.
    """

    def __init__(self, query: Query, copies: Sequence[SecondCopy]) -> None:
        self._query = query
        self._copies = copies
        self._lost: set[str] = set()

    def is_whole(self, copy: SecondCopy, pack: str, size: int) -> bool:
        """Whether a copy has every byte of a pack."""
        head = head_of(copy, pack, size) if copy.size(pack) == size else None
        if head is None:
            return False
        end = len(head.data)
        for tensor in head.info.tensors:
            if any(copy.read(pack, end, tensor.start - end)) or self._stored(copy, pack, tensor) is None:
                return False
            end = tensor.start + tensor.size
        return True

    def head(self, pack: str, size: int) -> Head | None:
        """The header of a pack; None if no copy has it."""
        for copy in self._copies:
            if found := head_of(copy, pack, size) or _kept(copy, pack, size):
                return found
        return None

    def pieces(self, head: Head) -> Iterator[bytes]:
        """The bytes of a pack, in order.

        Raises:
            Lost: if no copy has a tensor.
        """
        yield head.data
        end = len(head.data)
        for tensor in head.info.tensors:
            yield bytes(tensor.start - end)
            yield self._piece(head.info.digest, tensor)
            end = tensor.start + tensor.size
        yield bytes(head.info.size - end)

    def tensor(self, info: TensorInfo, depth: int = 0) -> bytes | None:
        """The bytes of a tensor; None if no copy has them."""
        if depth > _MAX_CHAIN or info.digest in self._lost:
            return None
        # Where differences rest on one another in a circle, it is not looked for again.
        self._lost.add(info.digest)
        for copy, pack, tensor in self._places(info):
            found = self._stored(copy, pack, tensor, depth=depth)
            if found is not None:
                self._lost.discard(info.digest)
                return found[1]
        return None

    def _piece(self, pack: str, tensor: PackedTensor) -> bytes:
        """The bytes that stand for a tensor in a pack."""
        for copy in self._copies:
            found = self._stored(copy, pack, tensor)
            if found is not None:
                return found[0]
        info = TensorInfo(tensor.dtype, tensor.shape, tensor.digest)
        data = None if tensor.is_coded else self.tensor(info)
        if data is None:
            raise Lost
        return data

    def _stored(
        self, copy: SecondCopy, pack: str, tensor: PackedTensor, *, depth: int = 0
    ) -> tuple[bytes, bytes] | None:
        """The bytes that stand for a tensor in a copy of a pack, and its own; None if these are not what was saved."""
        stored = copy.read(pack, tensor.start, tensor.size)
        data: bytes | None = stored
        if tensor.base:
            base = self.tensor(TensorInfo(tensor.dtype, tensor.shape, tensor.base), depth + 1)
            data = None if base is None else _decoded(tensor, stored, base)
        elif tensor.is_coded:
            data = _decoded(tensor, stored, bytes(byte_count(tensor.dtype, tensor.shape)))
        if data is None or len(data) != byte_count(tensor.dtype, tensor.shape):
            return None
        if tensor_digest(tensor.dtype, tensor.shape, data) != tensor.digest:
            return None
        return stored, data

    def _places(self, info: TensorInfo) -> Iterator[tuple[SecondCopy, str, PackedTensor]]:
        rows = self._query(
            "SELECT p.digest, t.start, t.base, t.coded FROM tensors t JOIN packs p ON p.number = t.pack "
            "WHERE t.digest = ? ORDER BY t.base IS NOT NULL, t.coded IS NOT NULL, p.damaged, p.number",
            [info.digest],
        )
        for pack, start, base, coded in rows:
            tensor = PackedTensor(info.digest, info.dtype, info.shape, start=start, base=base, coded=coded)
            for copy in self._copies:
                yield copy, str(pack), tensor
        for pack, tensor in self._in_other_packs.get(info.digest, ()):
            yield self._copies[-1], pack, tensor

    @functools.cached_property
    def _in_other_packs(self) -> Mapping[str, Sequence[tuple[str, PackedTensor]]]:
        """Where tensors lie in the last copy, by digest, those that take least to read first."""
        copy = self._copies[-1]
        found: dict[str, list[tuple[str, PackedTensor]]] = {}
        for pack in copy.packs():
            head = head_of(copy, pack, copy.size(pack))
            for tensor in head.info.tensors if head else ():
                found.setdefault(tensor.digest, []).append((pack, tensor))
        for places in found.values():
            places.sort(key=lambda place: (place[1].base is not None, place[1].is_coded))
        return found


def _kept(copy: SecondCopy, pack: str, size: int) -> Head | None:
    """The header of a pack that a copy keeps outside the pack."""
    found = copy.header(pack)
    if found is None or found["size"] != size:
        return None
    with contextlib.suppress(Corrupt):
        text = found["header"].encode(errors="surrogatepass")
        info = heads.pack_of(pack, text, found["head"], size)
        return Head(header.framed(text, found["head"]), info)
    return None


def _decoded(tensor: PackedTensor, stored: bytes, base: bytes) -> bytes | None:
    """A tensor that is stored coded; None if the coded bytes are malformed."""
    size = ELEMENT_TYPES[tensor.dtype].size
    if size not in differences.ITEM_SIZES:
        return None
    out = bytearray(len(base))
    with contextlib.suppress(Corrupt):
        decoding = differences.decoding(
            memoryview(stored), memoryview(base), item_size=size, out=memoryview(out)
        )
        for chunk in range(decoding.chunks):
            decoding.work(chunk)
        return bytes(out)
    return None
