"""What the server keeps: the registry in Redis, the blobs on disk. The only package that imports redis."""
