# SPDX-License-Identifier: BSD-3-Clause
"""What is known of the kernels here: ``python -m aspp_ext verify`` writes it, dispatch reads it.

An entry is a file for one environment (:mod:`.environment`) with a verdict for each implementation,
operator, precision and mode (:mod:`.entry`). Entries lie in a store of the user's, and those that
are committed in ``aspp_ext/verified`` (:mod:`.store`). :mod:`.rulings` is what follows from them.
"""
