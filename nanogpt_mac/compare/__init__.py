"""The comparison of every way this machine has: parity first, interleaved fresh processes, honest statistics."""
