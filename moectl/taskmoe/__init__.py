"""Specialist classifiers merged into one gated mixture over all their classes."""
