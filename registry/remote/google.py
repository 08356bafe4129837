"""Buckets of Google Cloud Storage."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from obstore.store import GCSStore

from registry.remote.accounts import GOOGLE_KEYS, check_google_keys, google_endpoint
from registry.remote.objects import ObjectBucket, Service

if TYPE_CHECKING:
    from registry.remote.urls import Address

_SERVICE = Service(
    bucket="bucket",
    no_bucket="NoSuchBucket",
    keys=GOOGLE_KEYS,
    keys_refused=("AuthenticationRequired", "ExpiredToken", "InvalidSecurity", "SignatureDoesNotMatch"),
    rights={
        "get": "storage.objects.get, or storage.objects.list if the object is not there",
        "list": "storage.objects.list",
        "put": "storage.objects.create, or storage.objects.delete if the object is there already",
        "delete": "storage.objects.delete",
    },
    endpoint="GOOGLE_BASE_URL",
    allow_http="GOOGLE_ALLOW_HTTP",
)


class GoogleBucket(ObjectBucket):
    """A bucket of Google Cloud Storage.

    Args:
        address: where it is; keys come from the environment, where obstore finds them.

    Raises:
        Invalid: if there are no keys, they are malformed, or the endpoint is not one to send them to.
    """

    def __init__(self, address: Address) -> None:
        check_google_keys()
        opener = functools.partial(GCSStore, address.bucket, prefix=address.prefix or None)
        super().__init__(address, _SERVICE, google_endpoint(), opener)
