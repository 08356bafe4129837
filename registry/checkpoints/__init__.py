"""Checkpoints: from live objects to a version of a model, and back, whole or in shards.

Checkpoint: a version, whose tensors stay on the disk until they are asked for. Component: one named tree of its state.
Shard: the part of a tensor that one of several processes holds.

It imports `registry.live`, `registry.catalog`, `registry.log`, `registry.configs`, `registry.home`,
`registry.reports.merged_names`, `registry.progress`, `registry.release` and `registry.store`. A new field of a version is added to `Facts` in `saving`,
and then to `Checkpoint`.
"""
