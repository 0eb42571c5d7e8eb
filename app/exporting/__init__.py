"""Export networks to files that run without this project."""
