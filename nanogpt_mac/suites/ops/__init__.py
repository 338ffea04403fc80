"""suite=ops: single operations, the published rows and this model's own."""
