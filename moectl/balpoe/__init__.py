"""Balanced product of calibrated experts for long-tailed classification."""
