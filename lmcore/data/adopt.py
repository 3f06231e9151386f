"""stub"""

from __future__ import annotations

from typing import Any


def validate_foreign(place: Any, level: str, report: Any, progress: Any) -> None:
    report.add("V200", place, "no manifest.json")
