"""Import trained networks: read their files without running code from them, check and measure them, and publish."""
