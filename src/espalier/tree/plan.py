"""Rows of one optimizer step -> Packs: which positions are computed, and once. Pure numpy, no torch."""

from __future__ import annotations
