"""Tasks: text and synthetic sequences."""
