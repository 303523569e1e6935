"""Trains the vocabulary: clean text in, a byte-level BPE with its chat template out."""
