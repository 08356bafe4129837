"""The cache: results of functions, kept in a registry under a key of their code and arguments.

Key: the digest of what a result depends on. Artifact: a result in the store, and what is recorded of it. Content: the
state of a file or folder that a function reads.

It imports `registry.catalog`, `registry.log`, `registry.home` and `registry.store`. To keep another type of result: a
row of `_PACKERS` in `results`.
"""
