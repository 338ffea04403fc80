"""The comparison of every variant this machine has: parity first, interleaved fresh processes, honest statistics."""
