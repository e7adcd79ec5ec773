"""Base model and adapter."""
