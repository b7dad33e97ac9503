"""A trained query router at work."""
