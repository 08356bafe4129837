"""The catalog: which checkpoints exist and what they are called, in tables that follow from the log. No torch.

Words: the *database* is the catalog's file; its *identity* tells it from a file that takes its place (database.py). The
*copy* is the catalog's own one of every entry of the log (copies.py). *Opening* leads to a connection that shows what
the log says (opening.py). The file and the write-ahead log beside it are *paired* if they are whole and belong together
(pairing.py). A *change* is what an entry does to the *tables* (change.py, tables.py). A *transaction* adds an entry,
and a *view* is the catalog inside it (transactions.py). *Publishing* stores trees and adds their entry (commit.py).
*Refolding* makes the catalog anew from the log (refolding.py). A *version* is a row, the answer to most questions
(versions.py, resolving.py). A *condition* says which versions are meant (conditions.py), and a *listing* is a sequence of
rows (listings.py). *Scalars* are what a run measured, in a file of its folder (scalars.py).

It imports `registry.log`, `registry.progress` and `registry.store`. SQL stands here, in `registry.upkeep` and in
`registry.cache.artifacts`. To add a record: its form and meaning in `registry.log`, and what it changes in the tables in
change.py. A question about versions: versions.py.
"""
