"""The inputs that the processor makes and the model reads. Imports neither of them."""
