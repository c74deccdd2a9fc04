// ExecuTorch's thread pool, as libexecutorch_threadpool.so exports it; the wheel ships no header for it.
// Only references to the class are used, so its data members are left out.
#pragma once

#include <executorch/runtime/core/function_ref.h>

#include <cstddef>
#include <cstdint>

// As in pthreadpool's own header, which the wheel does not ship either.
extern "C" {
struct pthreadpool;
struct pthreadpool_executor {
    int (*num_threads)(void* context);
    void (*schedule)(void* context, void* task_context, void (*task)(void*));
};
bool pthreadpool_update_executor(pthreadpool*, pthreadpool_executor*, void* context);
void pthreadpool_release_executor_threads(pthreadpool*);
std::size_t pthreadpool_get_threads_count(pthreadpool*);
std::size_t pthreadpool_set_threads_count(pthreadpool*, std::size_t count);  // up to what it was made with
}

namespace executorch::extension::threadpool {

class ThreadPool final {
  public:
    std::size_t get_thread_count() const;
    // Replaces the threads. Nothing may be running on the pool.
    bool _unsafe_reset_threadpool(std::uint32_t num_threads);
    // Calls fn(0) … fn(range - 1) on the pool's threads and returns when all are done.
    void run(runtime::FunctionRef<void(std::size_t)> fn, std::size_t range);
};

ThreadPool* get_threadpool();
pthreadpool* get_pthreadpool();  // what it runs on now

}  // namespace executorch::extension::threadpool
