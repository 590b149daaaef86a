"""What the model is: vision tower, projector, text decoder, and the cache it reads."""
