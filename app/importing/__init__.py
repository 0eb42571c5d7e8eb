"""Import trained networks: read their files without running code from them, check them, and publish them."""
