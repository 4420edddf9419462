"""Fused kernels: what they are, how they are compiled and how they are reached."""
