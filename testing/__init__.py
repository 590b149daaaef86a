"""What tests and benchmarks share: they import this package and never each other."""
