"""The parity gate: every way is held against float64 before any is timed."""
