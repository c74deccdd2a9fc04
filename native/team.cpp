#include "team.h"

#include <algorithm>
#include <system_error>

#include "memory.h"

namespace bedplate {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;

// What a thread of no work waits for the next step before it sleeps: longer than what lies between two steps.
constexpr microseconds kBetweenSteps{200};
// The others are at most so much later where each thread has a core of its own. Where some wait for a core, a
// thread that looks for them may hold it: then each learns to sleep at once.
constexpr microseconds kMostPatience{100}, kLeastPatience{2};

constexpr int kLooks = 16;  // between looks at the clock

void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

}  // namespace

void Count::wake() {
    // Either this sees a thread that is about to sleep, or that thread sees the value.
    if (asleep_.load() == 0) return;
    {
        const std::lock_guard<std::mutex> lock(mutex_);
    }
    woken_.notify_all();
}

bool Count::wait(std::uint64_t value, std::chrono::nanoseconds awake) {
    Clock::time_point limit;
    for (int looks = 1; !reached(value); ++looks) {
        pause();
        if (looks % kLooks != 0) continue;
        const auto now = Clock::now();
        if (looks == kLooks) limit = now + awake;
        if (now < limit) continue;
        std::unique_lock<std::mutex> lock(mutex_);
        ++asleep_;
        woken_.wait(lock, [&] { return value_.load() >= value; });
        --asleep_;
        return false;
    }
    return true;
}

Team::Team(int count) : count_(count), patience_(static_cast<std::size_t>(count), {kMostPatience}) {
    try {
        for (int i = 1; i < count; ++i) threads_.emplace_back([this, i] { serve(i); });
    } catch (const std::system_error&) {
        end();
        throw InvalidError("the system gives no more threads");
    }
}

Team::~Team() { end(); }

void Team::end() {
    ended_ = true;
    works_.add();
    works_.wake();
    for (auto& thread : threads_) thread.join();
}

void Team::run(const std::function<void(int)>& work) {
    if (count_ == 1) return work(0);
    work_ = &work;
    works_.add();
    works_.wake();
    work(0);
    meet(0);
}

std::uint64_t Team::arrive() {
    const auto size = static_cast<std::uint64_t>(count_);
    const std::uint64_t arrivals = arrivals_.add();
    if (arrivals % size != 0) return arrivals + size - arrivals % size;
    arrivals_.wake();
    return arrivals;
}

void Team::wait(int thread, std::uint64_t arrivals) {
    if (arrivals_.reached(arrivals)) return;
    auto& patience = patience_[static_cast<std::size_t>(thread)].time;
    const bool paid = arrivals_.wait(arrivals, patience);
    patience = std::clamp<std::chrono::nanoseconds>(paid ? patience * 2 : patience / 2, kLeastPatience,
                                                    kMostPatience);
}

void Team::serve(int index) {
    for (std::uint64_t next = 1;; ++next) {
        works_.wait(next, kBetweenSteps);
        if (ended_) return;
        (*work_)(index);
        meet(index);
    }
}

}  // namespace bedplate
