"""The catalog: which checkpoints exist and what they are called, as it follows from the log. No torch.

Words: an *entry* is one commit, a line of the *log* with its records (entries.py, journal.py). The *history* is the
entries in order (history.py). The *ledger* is what follows from them, in memory (ledger.py); the *catalog* is the same in
tables, with what the manifests and packs say (catalog.py, change.py, packs.py). A *view* is the catalog inside a commit.

It imports `registry.progress` and `registry.store`. SQL stands here, in `registry.upkeep` and in `registry.cache.artifacts`.
To add a record: its form in entries.py, its meaning in ledger.py and change.py. A question about versions: versions.py.
"""
