"""Triton kernels, installed as ``fastlora.kernels``: one stage a file, equation, kernel, launcher.

They import torch, triton and each other, and nothing else of fastlora. Importing this package
imports no kernel, so it works where Triton is not installed.
"""
