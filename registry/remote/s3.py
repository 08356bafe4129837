"""Buckets of S3, and of what speaks its protocol."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from obstore.store import S3Store

from registry.remote.keys import find_keys
from registry.remote.objects import ObjectBucket, Service

if TYPE_CHECKING:
    from registry.remote.urls import Address

_SERVICE = Service(
    bucket="bucket",
    no_bucket="NoSuchBucket",
    keys="AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, or AWS_PROFILE",
    keys_refused=(
        "ExpiredToken",
        "InvalidAccessKeyId",
        "InvalidToken",
        "SignatureDoesNotMatch",
        "TokenRefreshRequired",
    ),
    rights={
        "get": "GetObject, or ListBucket if the object is not there",
        "list": "ListBucket",
        "put": "PutObject",
        "delete": "DeleteObject",
    },
    endpoint="AWS_ENDPOINT_URL",
    allow_http="AWS_ALLOW_HTTP",
)


class S3Bucket(ObjectBucket):
    """A bucket of S3.

    Args:
        address: where it is; keys and endpoint come from the environment.

    Raises:
        Invalid: if there are no keys, or the endpoint is not one to send them to.
    """

    def __init__(self, address: Address) -> None:
        keys = find_keys()
        opener = functools.partial(
            S3Store,
            address.bucket,
            prefix=address.prefix or None,
            config=keys.options,
            credential_provider=keys.provider,
        )
        super().__init__(address, _SERVICE, keys.options.get("endpoint", ""), opener)
