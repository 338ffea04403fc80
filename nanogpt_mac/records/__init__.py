"""What the project writes down, as types: parsed, migrated and checked at one boundary (base.load)."""
