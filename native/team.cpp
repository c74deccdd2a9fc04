#include "team.h"

#include <chrono>
#include <system_error>

#include "memory.h"

namespace bedplate {
namespace {

// A thread that waits looks often at first. It then lets others run, for a machine may have more threads than
// cores.
constexpr int kLooks = 500;
// What a thread of no work waits for the next step before it sleeps: longer than what lies between two steps.
constexpr std::chrono::microseconds kAwake{200};

void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

}  // namespace

Team::Team(int count) : count_(count) {
    try {
        for (int i = 1; i < count; ++i) threads_.emplace_back([this, i] { serve(i); });
    } catch (const std::system_error&) {
        end();
        throw InvalidError("the system gives no more threads");
    }
}

Team::~Team() { end(); }

void Team::end() {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        ended_ = true;
    }
    woken_.notify_all();
    for (auto& thread : threads_) thread.join();
}

void Team::run(const std::function<void(int)>& work) {
    if (count_ == 1) return work(0);
    work_ = &work;
    bool wake;
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        turn_.fetch_add(1, std::memory_order_release);
        wake = asleep_ > 0;
    }
    if (wake) woken_.notify_all();
    work(0);
    meet();
}

void Team::meet() {
    if (count_ == 1) return;
    const unsigned meeting = meeting_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == count_ - 1) {
        arrived_.store(0, std::memory_order_relaxed);
        meeting_.store(meeting + 1, std::memory_order_release);
        return;
    }
    for (int looks = 0; meeting_.load(std::memory_order_acquire) == meeting; ++looks) {
        if (looks < kLooks)
            pause();
        else
            std::this_thread::yield();
    }
}

void Team::serve(int index) {
    for (unsigned seen = 0;; ++seen) {
        const auto limit = std::chrono::steady_clock::now() + kAwake;
        for (int looks = 1; turn_.load(std::memory_order_acquire) == seen && !ended_; ++looks) {
            pause();
            if (looks % 64 != 0 || std::chrono::steady_clock::now() < limit) continue;
            std::unique_lock<std::mutex> lock(mutex_);
            ++asleep_;
            woken_.wait(lock, [&] { return turn_ != seen || ended_; });
            --asleep_;
        }
        if (ended_) return;
        (*work_)(index);
        meet();
    }
}

}  // namespace bedplate
