"""Scripts that generate the pages and pictures of the documentation."""
