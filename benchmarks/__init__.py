# SPDX-License-Identifier: BSD-3-Clause
"""Benchmarks of aspp_ext against the best PyTorch can do and against other CPU runtimes."""
