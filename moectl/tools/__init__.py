"""Commands that look across systems: presets, runs, doctor."""
