"""The switch of bases: what the page says and draws of scaled and rotated channels, when it observes them, and for whom."""

from __future__ import annotations
