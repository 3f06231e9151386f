"""Fixtures of the training tests; what they are made of lies in small_runs.py."""

from __future__ import annotations
