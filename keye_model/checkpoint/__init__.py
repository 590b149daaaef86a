"""What is on disk: where a checkpoint lies, what its files say, and its weights."""
