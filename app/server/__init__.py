"""The processes, sockets and HTTP protocol of the service."""
