"""After training."""
