"""Keye-VL in other libraries. Nothing here is imported by `keye_model` itself."""
