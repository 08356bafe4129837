"""The catalog: which checkpoints exist and what they are called, in tables that follow from the log. No torch.

Words: the *database* is the catalog's file, with what tells it from another (database.py); the *copy* is the second one of
every entry, which it holds (copies.py). *Opening* leads to a connection that shows what the log says (opening.py). A *change*
is what an entry does to the *tables* (change.py, tables.py); a *transaction* adds one, and a *view* is the catalog inside it
(transactions.py). *Refolding* makes the catalog anew from the log (refolding.py). A *version* is a row, the answer to most
questions (versions.py, resolving.py).

It imports `registry.log`, `registry.progress` and `registry.store`. SQL stands here, in `registry.upkeep` and in
`registry.cache.artifacts`. To add a record: its form and meaning in `registry.log`, and what it changes in the tables in
change.py. A question about versions: versions.py.
"""
