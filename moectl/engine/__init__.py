"""Everything that is the same for every system: settings, runs, the training loop, files."""
