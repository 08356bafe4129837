"""Digests: the published function, over a tensor's type, shape and bytes."""

from __future__ import annotations

import os
import signal

import blake3
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.store.digest import digest, is_digest, preamble, tensor_digest
from registry.store.dtypes import ELEMENT_TYPES

# https://github.com/BLAKE3-team/BLAKE3/blob/master/test_vectors/test_vectors.json: input 0, 1, 2, ... 250, 0, ...
PUBLISHED = {
    0: "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262",
    1: "2d3adedff11b61f14c886e35afa036736dcd87a74d27b5c1510225d0f592e213",
    1_024: "42214739f095a406f3fc83deb889744ac00df831c10daa55189b5d121c855af7",
}


@pytest.mark.parametrize("length", PUBLISHED)
def test_digests_are_those_that_blake3_publishes(length: int) -> None:
    assert digest(bytes(i % 251 for i in range(length))) == PUBLISHED[length]


def test_a_tensors_digest_covers_the_line_of_the_format_and_the_bytes() -> None:
    data = bytes(range(24))
    assert preamble("float32", (6, 1)) == b"float32 [6,1]\n"
    assert preamble("bool", ()) == b"bool []\n"
    assert preamble("int8", [0]) == b"int8 [0]\n"
    assert tensor_digest("float32", (6, 1), data) == blake3.blake3(b"float32 [6,1]\n" + data).hexdigest()
    assert tensor_digest("int8", (0,), b"") == blake3.blake3(b"int8 [0]\n").hexdigest()


@given(
    st.lists(
        st.tuples(
            st.sampled_from(sorted(ELEMENT_TYPES)),
            st.lists(st.integers(0, 1 << 40), max_size=4).map(tuple),
            st.binary(max_size=8),
        ),
        unique=True,
        max_size=20,
    )
)
def test_another_type_shape_or_value_is_another_digest(
    tensors: list[tuple[str, tuple[int, ...], bytes]],
) -> None:
    assert len({tensor_digest(*tensor) for tensor in tensors}) == len(tensors)


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 9_000_001])
def test_threads_and_kinds_of_memory_do_not_change_a_digest(size: int) -> None:
    data = np.random.default_rng(size).bytes(size)
    expected = blake3.blake3(preamble("uint8", (size,)) + data).hexdigest()
    for threads in (None, 1, 2, 3):
        for memory in (data, bytearray(data), memoryview(data)):
            assert tensor_digest("uint8", (size,), memory, threads=threads) == expected
    assert digest(data) == digest(memoryview(data)) == blake3.blake3(data).hexdigest()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0" * 63,
        "0" * 65,
        "0" * 64 + "\n",
        "\n" + "0" * 63,
        "A" * 64,
        "g" * 64,
        "٠" * 64,
        b"0" * 64,
        None,
        0,
    ],
)
def test_only_64_lower_case_hex_digits_are_a_digest(text: object) -> None:
    assert not is_digest(text)


def test_a_digest_is_a_digest() -> None:
    assert is_digest(digest(b""))


def test_a_forked_process_hashes_without_the_threads_that_stayed_behind() -> None:
    data = bytes(8 << 20)
    expected = digest(data), tensor_digest("uint8", (len(data),), data)
    pid = os.fork()
    if not pid:
        signal.alarm(20)  # its default action ends the child
        same = (digest(data), tensor_digest("uint8", (len(data),), data)) == expected
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
