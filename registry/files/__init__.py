"""Files of other programs, read and written: `.pt`, safetensors, folders of shards.

Layout: where the parts of a checkpoint lie in the dict that a program saved. Foreign: what cannot be imported, and what to do
with it. Nothing that a file names is run.

It imports `registry.checkpoints`, `registry.catalog`, `registry.log`, `registry.progress` and `registry.store`.
"""
