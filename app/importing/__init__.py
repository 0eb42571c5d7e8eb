"""Import networks that were trained outside this project: read their files, check them, and publish them."""
