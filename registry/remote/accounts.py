"""Where the services are that a user means, and whether there are keys for them, as the environment says; without a network.

obstore finds the keys for Google Cloud Storage and Azure by itself. Where there are none, it asks an address that only
machines of these services have, and waits for it. So it is asked nothing before this module has seen that there are some.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from registry.remote.keys import find_places
from registry.store.errors import Invalid

if TYPE_CHECKING:
    from registry.remote.urls import Address

GOOGLE_KEYS = "GOOGLE_APPLICATION_CREDENTIALS, GOOGLE_SERVICE_ACCOUNT or GOOGLE_SERVICE_ACCOUNT_KEY"
AZURE_KEYS = (
    "AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY, with AZURE_STORAGE_SAS_TOKEN, or with AZURE_TENANT_ID, "
    "AZURE_CLIENT_ID and AZURE_CLIENT_SECRET"
)

_GOOGLE = (
    "GOOGLE_APPLICATION_CREDENTIALS",
    "GOOGLE_SERVICE_ACCOUNT",
    "GOOGLE_SERVICE_ACCOUNT_PATH",
    "GOOGLE_SERVICE_ACCOUNT_KEY",
    "GOOGLE_BEARER_TOKEN",
    "GOOGLE_SKIP_SIGNATURE",
    "GCE_METADATA_HOST",
)
_GOOGLE_FILE = "~/.config/gcloud/application_default_credentials.json"
_AZURE = (
    "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_ACCESS_KEY",
    "AZURE_STORAGE_MASTER_KEY",
    "AZURE_STORAGE_SAS_TOKEN",
    "AZURE_STORAGE_SAS_KEY",
    "AZURE_STORAGE_TOKEN",
    "AZURE_STORAGE_CLIENT_SECRET",
    "AZURE_CLIENT_SECRET",
    "AZURE_FEDERATED_TOKEN_FILE",
    "AZURE_CREDENTIAL_TYPE",
    "AZURE_MSI_ENDPOINT",
    "AZURE_IDENTITY_ENDPOINT",
    "IDENTITY_ENDPOINT",
    "AZURE_USE_AZURE_CLI",
    "AZURE_SKIP_SIGNATURE",
)
"""Variables by which obstore finds keys, or is told how to."""
_TRUE = ("1", "true", "on", "yes", "y")
_EMULATED = "devstoreaccount1"


def endpoint_of(address: Address) -> str:
    """What tells apart buckets of the same URL: where their service, or their account, is. Empty for the service's own place.

    Raises:
        Invalid: if the environment does not say it.
    """
    if address.scheme == "s3":
        return find_places().get("endpoint", "")
    if address.scheme == "gs":
        return google_endpoint()
    return azure_endpoint() if address.scheme == "az" else ""


def google_endpoint() -> str:
    """Where Google Cloud Storage is; empty for its own place."""
    return os.environ.get("GOOGLE_BASE_URL", "")


def check_google_keys() -> None:
    """See that there are keys for Google Cloud Storage.

    Raises:
        Invalid: if there are none, saying which variables give them.
    """
    if _is_set(_GOOGLE) or Path(os.path.expanduser(_GOOGLE_FILE)).exists():
        return
    raise Invalid(
        "there are no keys for gs://",
        f"set {GOOGLE_KEYS}, or run: gcloud auth application-default login",
        "on a machine of Google, set GCE_METADATA_HOST=metadata.google.internal",
    )


def azure_endpoint() -> str:
    """Where an account of Azure is. Its name is part of that, and two accounts may have containers of one name.

    Raises:
        Invalid: if the environment names no account.
    """
    if uses_azure_emulator():
        url = os.environ.get("AZURITE_BLOB_STORAGE_URL") or "http://127.0.0.1:10000"
        return f"{url.rstrip('/')}/{os.environ.get('AZURE_STORAGE_ACCOUNT_NAME') or _EMULATED}"
    account = os.environ.get("AZURE_STORAGE_ACCOUNT_NAME")
    if not account:
        raise Invalid("AZURE_STORAGE_ACCOUNT_NAME is not set", f"az:// needs {AZURE_KEYS}")
    endpoint = os.environ.get("AZURE_STORAGE_ENDPOINT") or os.environ.get("AZURE_ENDPOINT")
    return endpoint or f"https://{account}.blob.core.windows.net"


def check_azure_keys() -> None:
    """See that there are keys for Azure.

    Raises:
        Invalid: if there are none, saying which variables give them.
    """
    if not uses_azure_emulator() and not _is_set(_AZURE):
        raise Invalid(
            "there are no keys for az://",
            f"set {AZURE_KEYS}",
            "on a machine of Azure, set AZURE_CREDENTIAL_TYPE=managed_identity",
        )


def uses_azure_emulator() -> bool:
    """Whether the environment names the emulator on this computer, which has an account and keys of its own."""
    return os.environ.get("AZURE_STORAGE_USE_EMULATOR", "").lower() in _TRUE


def _is_set(names: tuple[str, ...]) -> bool:
    return any(os.environ.get(name) for name in names)
