"""What runs requests: admission, prefill, decode steps, sampling, and the plan of their cost."""
