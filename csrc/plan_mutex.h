// SPDX-License-Identifier: BSD-3-Clause
// What guards a library's caches of plans. No fork happens while it is held, so that a child, which
// has none of the threads that could let go of it, never finds it locked. To be held for a look or
// an entry, not while planning.
#pragma once

#include <pthread.h>

#include <mutex>

namespace aspp {

inline std::mutex plan_mutex;

// When the library is loaded. glibc forgets it when that is closed.
[[maybe_unused]] inline const int plan_mutex_is_free_in_children = pthread_atfork(
    [] { plan_mutex.lock(); }, [] { plan_mutex.unlock(); }, [] { plan_mutex.unlock(); });

}  // namespace aspp
