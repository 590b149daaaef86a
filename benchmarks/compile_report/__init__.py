"""The compile report: every kernel at the launches of the real shapes, for GPUs that are not here.

``compiled`` notes and compiles Triton's launches, ``traffic`` counts the bytes they ask for,
``cuda_kernels`` reads the CUDA extension, ``sass`` reads machine code, ``report`` puts it together.
"""
