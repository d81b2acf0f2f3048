"""What a finished model becomes: an artifact, or a file for another runtime."""
