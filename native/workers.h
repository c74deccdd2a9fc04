// Threads for ExecuTorch's pool that stay awake while a step runs.
//
// The pool's own sleep after 1,000 pauses without work. One thread takes as long to set a delegate up, twenty
// times and more in a step, and waking them costs more than what they do for a single token.
#pragma once

#include <cstddef>

#include "threadpool.h"

#if defined(__SANITIZE_THREAD__)
extern "C" void __tsan_acquire(void* address);
extern "C" void __tsan_release(void* address);
#endif

namespace bedplate {

// Has the pool of the process compute on `count` threads, the caller among them, that stay awake while an
// Awake lives. The first call, when nothing may be running on the pool, decides how many there can be: one
// for each core or `count`, whichever is more. Throws NativeError if there are fewer.
void set_threads(std::size_t count);
std::size_t threads();

class Awake {
  public:
    Awake();
    ~Awake();
    Awake(const Awake&) = delete;
    Awake& operator=(const Awake&) = delete;
};

// Calls task(0) … task(count - 1) on the pool's threads and returns when all are done.
template <class Task>
void run_on_pool(const Task& task, std::size_t count) {
    auto* pool = executorch::extension::threadpool::get_threadpool();
#if defined(__SANITIZE_THREAD__)
    // The pool orders what comes before a run, its tasks and what comes after, but in code that the sanitizer
    // has not seen.
    static char before, after;
    const auto ordered = [&](std::size_t index) {
        __tsan_acquire(&before);
        task(index);
        __tsan_release(&after);
    };
    __tsan_release(&before);
    pool->run(ordered, count);
    __tsan_acquire(&after);
#else
    pool->run(task, count);
#endif
}

}  // namespace bedplate
