"""The release: which version of this package runs."""

VERSION = "0.1.0"
