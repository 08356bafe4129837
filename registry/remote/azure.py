"""Containers of Azure Blob Storage."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from obstore.store import AzureStore

from registry.remote.accounts import AZURE_KEYS, azure_endpoint, check_azure_keys, uses_azure_emulator
from registry.remote.objects import ObjectBucket, Service

if TYPE_CHECKING:
    from obstore.store import AzureConfig

    from registry.remote.urls import Address

_SERVICE = Service(
    bucket="container",
    no_bucket="ContainerNotFound",
    keys=AZURE_KEYS,
    keys_refused=(
        "AuthenticationFailed",
        "AuthorizationFailure",
        "InvalidAuthenticationInfo",
        "KeyBasedAuthenticationNotPermitted",
        "NoAuthenticationInformation",
    ),
    rights={
        "get": "to read blobs, or to list them if the blob is not there",
        "list": "to list blobs",
        "put": "to write blobs",
        "delete": "to delete blobs",
    },
    endpoint="AZURE_STORAGE_ENDPOINT",
    allow_http="AZURE_ALLOW_HTTP",
)


class AzureBucket(ObjectBucket):
    """A container of Azure Blob Storage.

    Args:
        address: where it is; account and keys come from the environment, where obstore finds them.

    Raises:
        Invalid: if there is no account, there are no keys, they are malformed, or the endpoint is not one to send them to.
    """

    def __init__(self, address: Address) -> None:
        endpoint = azure_endpoint()
        check_azure_keys()
        config: AzureConfig = {} if uses_azure_emulator() else {"endpoint": endpoint}
        opener = functools.partial(AzureStore, address.bucket, prefix=address.prefix or None, config=config)
        super().__init__(address, _SERVICE, endpoint, opener)
