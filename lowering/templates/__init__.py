"""Kernel templates and their two hosts. Importing this package does not import triton."""
