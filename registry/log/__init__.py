"""The log: all that happened in a registry, and what follows from it by folding. No SQLite, no torch.

Words: an *entry* is one commit, a line of the log with its *records* (entries.py). The *journal* is the log's files in the
folder (journal.py). The *history* is the entries in their order, with what is lost of them named as *gaps* (history.py).
The *ledger* is what follows from them, in memory (ledger.py). *Facts* are what a manifest's record says of a checkpoint
(facts.py). A *stray* is a pack or manifest that no readable entry names (strays.py). What a model, a run or a metric may be
called is said in reference.py and metrics.py.

It imports `registry.store` alone. To add a record: its form in entries.py, its meaning in ledger.py, and in
`registry.catalog.change` for the tables.
"""
