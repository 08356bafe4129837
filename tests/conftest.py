"""Settings of the whole suite."""

from __future__ import annotations

from hypothesis import settings

# machines are shared: how long an example takes proves nothing
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
