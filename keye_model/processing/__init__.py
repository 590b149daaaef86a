"""Pictures, videos and words → host tensors. Knows nothing of the model that reads them."""
