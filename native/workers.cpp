#include "workers.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "platform.h"

namespace bedplate {
namespace {

using executorch::extension::threadpool::get_pthreadpool;
using executorch::extension::threadpool::get_threadpool;
using executorch::extension::threadpool::ThreadPool;

void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// What the pool asks for threads. A task is the pool's loop of a thread: it ends when there was no work for a
// while, and is handed out again with the next work.
class Workers {
  public:
    void keep(std::size_t count) {
        for (; threads_ < count; ++threads_) std::thread([this] { work(); }).detach();
    }
    void schedule(void (*task)(void*), void* context) {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            tasks_.push_back({task, context});
            waiting_.store(tasks_.size(), std::memory_order_release);
        }
        came_.notify_one();
    }
    std::size_t size() const { return threads_; }
    std::atomic<bool> awake{false};

  private:
    struct Task {
        void (*run)(void*);
        void* context;
    };

    void work() {
        for (;;) {
            const Task task = next();
            task.run(task.context);
        }
    }
    Task next() {
        for (;;) {
            while (awake.load(std::memory_order_relaxed) && waiting_.load(std::memory_order_acquire) == 0)
                pause();
            std::unique_lock<std::mutex> lock(mutex_);
            if (!awake) came_.wait(lock, [this] { return !tasks_.empty(); });
            if (tasks_.empty()) continue;
            const Task task = tasks_.back();
            tasks_.pop_back();
            waiting_.store(tasks_.size(), std::memory_order_release);
            return task;
        }
    }

    std::mutex mutex_;
    std::condition_variable came_;
    std::vector<Task> tasks_;
    std::atomic<std::size_t> waiting_{0};
    std::size_t threads_ = 0;
};

// Never destroyed: the pool of the process takes its threads back to the very end.
Workers& workers() {
    static auto* const all = new Workers;
    return *all;
}

int count_workers(void* self) { return static_cast<int>(static_cast<Workers*>(self)->size()); }

void schedule(void* self, void* context, void (*task)(void*)) {
    static_cast<Workers*>(self)->schedule(task, context);
}

// Counts the pool's own threads: each makes one, and it goes with the thread.
std::atomic<std::size_t> present{0};
struct Presence {
    Presence() { ++present; }
    ~Presence() { --present; }
};

void meet_all(std::size_t count) {
    std::atomic<std::size_t> arrived{0};
    const auto caller = std::this_thread::get_id();
    const auto arrive = [&](std::size_t) {
        if (std::this_thread::get_id() != caller) thread_local const Presence presence;
        ++arrived;
        while (arrived < count) std::this_thread::yield();
    };
    run_on_pool(arrive, count);
}

// The pool would hand one thread's share out twice if ours came before its own have left.
void dismiss_own_threads(pthreadpool* pool) {
    pthreadpool_release_executor_threads(pool);
    const auto limit = std::chrono::steady_clock::now() + std::chrono::seconds(10);
    while (present > 0) {
        if (std::chrono::steady_clock::now() > limit)
            throw NativeError("Internal", "threads of ExecuTorch's pool do not end when they are told to");
        std::this_thread::yield();
    }
}

// The pool stays as it is from here on: loaded programs hold on to it.
std::size_t adopt(ThreadPool& pool, std::size_t least) {
    if (pool.get_thread_count() < least) pool._unsafe_reset_threadpool(static_cast<std::uint32_t>(least));
    const std::size_t count = threads();
    if (count == 1) return count;
    meet_all(count);
    workers().keep(count - 1);
    pthreadpool_executor executor{count_workers, schedule};
    pthreadpool_update_executor(get_pthreadpool(), &executor, &workers());
    dismiss_own_threads(get_pthreadpool());
    return count;
}

}  // namespace

void set_threads(std::size_t count) {
    static const std::size_t most = adopt(*get_threadpool(), count);
    if (count > most)
        throw NativeError("InvalidArgument", "this process has " + std::to_string(most) + " threads, not " +
                                                 std::to_string(count));
    pthreadpool_set_threads_count(get_pthreadpool(), count);
}

// Not what ThreadPool::get_thread_count says: that is how many it was made with.
std::size_t threads() { return pthreadpool_get_threads_count(get_pthreadpool()); }

Awake::Awake() { workers().awake = true; }
Awake::~Awake() { workers().awake = false; }

}  // namespace bedplate
