"""The network: vision tower, projector, text decoder, and its key/value cache."""
