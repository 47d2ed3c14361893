"""What a run leaves for people and programs: a JSON document, a page, and lists of runs."""

from __future__ import annotations
