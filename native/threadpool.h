// ExecuTorch's thread pool, as libexecutorch_threadpool.so exports it; the wheel ships no header for it.
// Only references to the class are used, so its data members are left out.
#pragma once

#include <executorch/runtime/core/function_ref.h>

#include <cstddef>
#include <cstdint>

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

}  // namespace executorch::extension::threadpool
