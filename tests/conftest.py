"""Settings of the whole suite."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("untimed", deadline=None)  # machines are shared: how long an example takes proves nothing
settings.load_profile("untimed")
