// Threads that compute one step together: each runs the same function, and they wait for each other between
// its parts.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
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
    // Returns when it has reached the value. The thread stays awake for so long.
    void wait(std::uint64_t value, std::chrono::nanoseconds awake);

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
    // InvalidError: this process was forked from the one that made the team, and has none of its threads.
    void check_process() const;
    // Runs work(0) … work(size - 1), the first on the caller's thread; returns when all have. Work must not
    // throw.
    void run(const std::function<void(int)>& work);
    // Called by every thread of a running work: returns when all have called it.
    void meet() { wait(arrive()); }
    // The two halves of a meeting: in between, a thread does what needs nothing of the others.
    std::uint64_t arrive();
    void wait(std::uint64_t arrivals);

  private:
    struct Crew {
        std::vector<std::thread> threads;
        const std::function<void(int)>* work = nullptr;
        Count works;
        Count arrivals;  // at meetings: each ends when the count is a multiple of the threads
        std::atomic<bool> ended{false};
    };

    void serve(int index);
    void end();

    const int count_;
    const long process_;
    std::unique_ptr<Crew> crew_;
};

}  // namespace bedplate
