"""Ways of running the model: one protocol (base), THE registry (kinds), and one file a framework."""
