"""Our ops inside other libraries' models. Nothing here is imported by `keye_kernels` itself."""
