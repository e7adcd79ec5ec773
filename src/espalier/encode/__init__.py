"""Examples to token ids and labels."""
