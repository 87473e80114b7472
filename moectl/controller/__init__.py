"""A policy that sets how much of a vision-language mixture runs, to meet a latency budget."""
