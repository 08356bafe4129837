"""Upkeep: freeing, checking, shrinking, repairing and rebuilding a registry. No torch at the top of a module.

Words: *garbage* is what nothing needs (garbage.py); a *doomed* pack may be deleted by anybody, and its name is never used
again (dooming.py). *Repacking* writes what is needed of a pack to a new one, which takes its place (repacking.py):
thinning and compaction do it. What compaction codes, and from what, is *chosen* first (choosing.py); tensors of models without
a common history are found to be *near* by their *sketches* (nearness.py). A *second copy* is a folder or bucket that may have what a registry has lost
(second_copies.py). What it gives is *gathered* by digest (gathering.py), to *repair* the registry (repairing.py).
*Own bytes* are those that were written for a version first (usage.py).

It imports `registry.home`, `registry.catalog`, `registry.remote`, `registry.log`, `registry.progress` and
`registry.store`. To add an operation: one file here, one method in `registry.registry`.
"""
