"""Concept-based similarity reasoning on medical images."""
