# SPDX-License-Identifier: BSD-3-Clause
"""Benchmarks on a GPU. Each also walks its steps on a CPU, where only its own logic is tested."""
