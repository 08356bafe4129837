"""The services whose buckets can hold a shared registry; another one is a row of the table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from registry.remote.azure import AzureBucket
from registry.remote.google import GoogleBucket
from registry.remote.s3 import S3Bucket

if TYPE_CHECKING:
    from registry.remote.objects import ObjectBucket
    from registry.remote.urls import Address

_SERVICES = {"s3": S3Bucket, "gs": GoogleBucket, "az": AzureBucket}
"""By the scheme of a URL."""


def open_bucket(address: Address) -> ObjectBucket:
    """The bucket at an address. It asks nothing of the network yet.

    Raises:
        Invalid: if there are no keys for it in the environment, or they are malformed.
    """
    return _SERVICES[address.scheme](address)
