"""Stand-ins for parts of the service."""
