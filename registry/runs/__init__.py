"""Runs: one training session, with its log, its provenance and the versions that it saves.

Run: the session, as a context manager. Provenance: how a version was made: command, code, software, devices. Process:
the program that runs, and the signals that ask it to stop.

It may import every layer below its own. What a run records is decided in `recording`.
"""
