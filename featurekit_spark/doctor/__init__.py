"""Checks of a machine and of settings, before a run finds out: each a function that returns a Check."""

from __future__ import annotations

from featurekit_spark.doctor.base import Check, Status, worst

__all__ = ["Check", "Status", "worst"]
