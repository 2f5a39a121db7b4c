# SPDX-License-Identifier: BSD-3-Clause
"""The operators in Triton. Importing this imports Triton, so aspp_ext does it when one runs."""
