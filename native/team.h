// Threads that compute one step together: each runs the same function, and they wait for each other between
// its parts.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace bedplate {

// A count that threads wait for. They look at it first, and sleep if that takes too long.
class Count {
  public:
    // Adds one, and returns what it is then.
    std::uint64_t add() { return value_.fetch_add(1) + 1; }
    // Wakes those that sleep.
    void wake();
    bool reached(std::uint64_t value) const { return value_.load(std::memory_order_acquire) >= value; }
    // Returns when it has reached the value; whether it had before the thread fell asleep.
    bool wait(std::uint64_t value, std::chrono::nanoseconds awake);

  private:
    alignas(64) std::atomic<std::uint64_t> value_{0};
    std::atomic<int> asleep_{0};
    std::mutex mutex_;
    std::condition_variable woken_;
};

class Team {
  public:
    explicit Team(int count);
    ~Team();
    Team(const Team&) = delete;
    Team& operator=(const Team&) = delete;

    int size() const { return count_; }
    // Runs work(0) … work(size - 1), the first on the caller's thread; returns when all have. Work must not
    // throw.
    void run(const std::function<void(int)>& work);
    // Called by every thread of a running work: returns when all have called it.
    void meet(int thread) { wait(thread, arrive()); }
    // The two halves of a meeting: in between, a thread does what needs nothing of the others.
    std::uint64_t arrive();
    void wait(int thread, std::uint64_t arrivals);

  private:
    void serve(int index);
    void end();

    const int count_;
    std::vector<std::thread> threads_;
    const std::function<void(int)>* work_ = nullptr;
    Count works_;
    Count arrivals_;  // at meetings: each ends when the count is a multiple of the threads
    std::atomic<bool> ended_{false};
    struct alignas(64) Patience {
        std::chrono::nanoseconds time;
    };
    std::vector<Patience> patience_;  // of each thread, at meetings
};

}  // namespace bedplate
