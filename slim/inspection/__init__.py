"""Looking into a compilation from outside: which site spoils the output, what a model looks like, what failed."""

from __future__ import annotations

from slim.inspection.bisect import Finding, bisect

__all__ = ["Finding", "bisect"]
