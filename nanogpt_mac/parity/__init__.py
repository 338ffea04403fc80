"""The parity gate: every variant must compute what float64 computes before it is timed."""
