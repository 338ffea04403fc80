"""Which operators run on MPS, for any torch, and whether this model needs one that does not."""
