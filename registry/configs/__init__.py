"""Configurations: documents in JSON, YAML and TOML, and the typed, checked settings that are made of them.

Document: a table of names and values, as a file holds it. Config: a document that pydantic has checked against a class.
Plain value: a value that JSON can express; everything that is recorded becomes one.

It imports `registry.store`, no torch, and knows nothing of a registry. To add a document format: a row of `_PARSERS` in
`documents`.
"""
