"""From run folders to comparison.json: what was measured, who is fastest, how sure that is."""
