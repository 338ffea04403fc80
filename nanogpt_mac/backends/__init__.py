"""Ways of running the model: one protocol (base), one file a framework, and what this machine has (detect)."""
