"""One training run: schedule, loop, clock, records, checkpoints. Knows no framework."""
