"""Device kernels behind torch.library custom ops, which take tensors and numbers only.

Importing this package imports no kernel: Triton may be absent, and its interpreter (TRITON_INTERPRET=1) must be asked for
before a kernel is decorated.
"""
