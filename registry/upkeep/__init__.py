"""Upkeep: freeing, checking, shrinking and rebuilding a registry. No torch at the top of a module.

Words: *garbage* is what nothing needs (garbage.py); a *doomed* pack may be deleted by anybody, and its name is never used
again (dooming.py). *Repacking* writes what is needed of a pack to a new one, which takes its place (repacking.py):
thinning and compaction do it.

It imports `registry.catalog`, `registry.log`, `registry.progress` and `registry.store`. To add an operation: one file here,
one method in `registry.registry`.
"""
