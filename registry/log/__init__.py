"""The log: all that happened in a registry, and what follows from it by folding. No SQLite, no torch.

Words: an *entry* is one commit, a line of the log with its *records* (entries.py). The *journal* is the log's files in the
folder (journal.py). The *history* is the entries in order; a *gap* in it stands for entries that cannot be read
(history.py). To *fold* the log is to apply its entries one after another, and the *ledger* is the result, in memory
(ledger.py). An entry that contradicts those before it is *void*: it has no effect. A pack *counts* from the entry that
names it until one dooms or replaces it; a manifest counts while a version or an artifact has it. *Facts* are what a
manifest's record says of a checkpoint (facts.py). A *stray* is a pack or manifest that no readable entry names
(strays.py). forking.py keeps a process from being forked inside a change. reference.py and metrics.py say what a model, a run or a metric may be called.

It imports `registry.store` alone. To add a record: its form in entries.py, its meaning in ledger.py, and in
`registry.catalog.change` for the tables.
"""
