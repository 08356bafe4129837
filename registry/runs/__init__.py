"""Runs: one training session, with its log, its provenance and the versions that it saves.

Run: the session, as a context manager. Provenance: what a version was made with: code, packages, machine, seeds. Process: what
runs, which signals ask to stop.

It imports everything below but `registry.registry`. What a run records is decided in `recording`.
"""
