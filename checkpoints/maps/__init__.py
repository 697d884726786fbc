"""Key maps as data (strings only, no model imports)."""
