"""Fixtures of this folder."""

from __future__ import annotations

from tests.calibrate.trained import trained_dense, trained_experts

__all__ = ["trained_dense", "trained_experts"]
