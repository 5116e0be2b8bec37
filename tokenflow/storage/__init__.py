"""What is on disk: files that are whole or not there, digests, the cache."""
