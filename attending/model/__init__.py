"""One decoder for every architecture, and its checkpoints in and out."""
