"""The catalog: which checkpoints exist and what they are called, in tables that follow from the log. No torch.

Words: the *catalog* holds what follows from the log, with what the manifests and packs say (catalog.py, change.py).
A *view* is the catalog inside a commit. The *copy* is the second one of every entry, which the catalog has (copies.py).

It imports `registry.log`, `registry.progress` and `registry.store`. SQL stands here, in `registry.upkeep` and in
`registry.cache.artifacts`. To add a record: its form and meaning in `registry.log`, and what it changes in the tables in
change.py. A question about versions: versions.py.
"""
