// SPDX-License-Identifier: BSD-3-Clause
// The planner: which taps are live where, in which regions and units of work, at which cost.
#pragma once

#include "cost.h"
#include "merge.h"
#include "polyphase.h"
#include "print.h"
#include "schedule.h"
#include "units.h"
#include "work_list.h"
