"""Triton kernels, installed as ``fastlora.kernels``: one stage a file, equation, kernel, launcher.

They import torch, triton and each other, and nothing else of fastlora. Importing this package
imports no kernel, so it works where Triton is not installed.

Launchers take 2-D tensors of any strides, of float32, bfloat16 or float16; those called "wide" are
float32. Sizes: M tokens, K in_features, N out_features, r rank, R = G * r. Offsets are computed in
64 bits, sums in float32, and no result depends on the order in which programs run.
"""
