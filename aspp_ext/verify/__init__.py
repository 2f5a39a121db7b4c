# SPDX-License-Identifier: BSD-3-Clause
"""``python -m aspp_ext verify``: which kernels are right and fast on this machine.

:mod:`.command` runs cases (:mod:`.cases`) in processes of their own (:mod:`.isolation`): whether an
implementation is right (:mod:`.rightness`; what is wrong is described by :mod:`.failure`) and
whether it is faster than PyTorch (:mod:`.contest`). Each result is a line of a journal
(:mod:`.journal`), of which the entry is made that dispatch reads (:mod:`aspp_ext.evidence`).
"""
