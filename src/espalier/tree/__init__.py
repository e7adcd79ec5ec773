"""The prompt tree: what is computed, and once."""
