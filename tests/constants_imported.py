# SPDX-License-Identifier: BSD-3-Clause
"""A constant that is imported where it is read."""

K = 2.0
