// Threads that compute one step together: each runs the same function, and they wait for each other between
// its parts.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace bedplate {

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
    void meet();

  private:
    void serve(int index);
    void end();

    const int count_;
    std::vector<std::thread> threads_;
    std::mutex mutex_;
    std::condition_variable woken_;
    const std::function<void(int)>* work_ = nullptr;
    std::atomic<unsigned> turn_{0};     // counts works
    std::atomic<int> arrived_{0};       // at the current meeting
    std::atomic<unsigned> meeting_{0};  // counts meetings
    std::atomic<bool> ended_{false};
    int asleep_ = 0;
};

}  // namespace bedplate
