"""Keys and region of an S3 store, as the environment and the files of AWS tools give them; found without a network."""

from __future__ import annotations

import configparser
import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from registry.store.errors import Invalid
from registry.store.text import quoted

if TYPE_CHECKING:
    from obstore.store import S3Config

_ELSEWHERE = (
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)
"""Variables by which a platform says where keys come from; obstore follows them by itself."""


class Keys(NamedTuple):
    """What a client of S3 needs. It is never printed, logged, stored or pickled.

    Attributes:
        options: of `obstore.store.S3Store`.
        provider: gives keys that expire, from boto3; None for none.
    """

    options: S3Config
    provider: Any = None

    def __repr__(self) -> str:
        return "Keys(...)"

    def __reduce__(self) -> Any:
        raise TypeError("keys are not pickled; another process finds its own")


def find_keys() -> Keys:
    """The keys to use: those of the environment, of the platform, of the profile's files, or of boto3, in this order.

    Raises:
        Invalid: if there are none, saying which variables give them.
    """
    options = find_places()
    key, secret = os.environ.get("AWS_ACCESS_KEY_ID"), os.environ.get("AWS_SECRET_ACCESS_KEY")
    if key and secret:
        options |= {"access_key_id": key, "secret_access_key": secret}
        if token := os.environ.get("AWS_SESSION_TOKEN"):
            options["session_token"] = token
        return Keys(options)
    if key or secret:
        missing = "AWS_SECRET_ACCESS_KEY" if key else "AWS_ACCESS_KEY_ID"
        raise Invalid(f"{missing} is not set, its counterpart is", "set both, or neither")
    if any(os.environ.get(name) for name in _ELSEWHERE):
        return Keys(options)
    profile = os.environ.get("AWS_PROFILE") or "default"
    static = _section("AWS_SHARED_CREDENTIALS_FILE", "credentials", profile)
    if "aws_access_key_id" in static and "aws_secret_access_key" in static:
        options["access_key_id"] = static["aws_access_key_id"]
        options["secret_access_key"] = static["aws_secret_access_key"]
        if token := static.get("aws_session_token"):
            options["session_token"] = token
        return Keys(options)
    if find_spec("boto3") is not None and (provider := _from_boto3()) is not None:
        return Keys(options, provider)
    raise Invalid(
        "there are no keys for S3",
        f"set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE (profile {quoted(profile)} has none)",
        "single sign-on and roles need: pip install boto3",
    )


def find_places() -> S3Config:
    """Endpoint and region."""
    config = _section("AWS_CONFIG_FILE", "config", os.environ.get("AWS_PROFILE") or "default")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or config.get("region")
    found: S3Config = {"region": region or "us-east-1"}
    endpoint = (
        os.environ.get("AWS_ENDPOINT_URL_S3")
        or os.environ.get("AWS_ENDPOINT_URL")
        or config.get("endpoint_url")
    )
    if endpoint:
        found["endpoint"] = endpoint
    return found


def _section(variable: str, name: str, profile: str) -> dict[str, str]:
    """A profile in one of the files of AWS tools; empty if it is not there.

    Raises:
        Invalid: if the file cannot be read; nothing of it is repeated.
    """
    path = Path(os.environ.get(variable) or f"~/.aws/{name}").expanduser()
    parser = configparser.RawConfigParser()
    try:
        parser.read_string(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, configparser.Error) as error:
        raise Invalid(
            f"{path}: cannot be read ({type(error).__name__})", f"mend it, or set {variable}"
        ) from None
    for section in (profile, f"profile {profile}"):
        if parser.has_section(section):
            return dict(parser.items(section))
    return {}


def _from_boto3() -> Any:
    """Keys that boto3 finds, such as those of single sign-on; None if it finds none without asking a network."""
    import boto3

    # The address that virtual machines ask for keys does not answer elsewhere, and is waited for.
    before = os.environ.get("AWS_EC2_METADATA_DISABLED")
    os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")
    try:
        session = boto3.Session()
        if not session.get_credentials():
            return None
        # Lazy: loads obstore.
        from obstore.auth.boto3 import Boto3CredentialProvider

        return Boto3CredentialProvider(session)
    finally:
        if before is None:
            del os.environ["AWS_EC2_METADATA_DISABLED"]
