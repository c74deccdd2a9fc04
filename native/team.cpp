#include "team.h"

#include <unistd.h>

#include <system_error>

#include "memory.h"

namespace bedplate {
namespace {

using Clock = std::chrono::steady_clock;

// What a thread of no work waits for the next step before it sleeps: longer than what lies between two steps.
// Where it shares its core, it sleeps at once.
constexpr std::chrono::microseconds kBetweenSteps{200};
// The others are at most so much later where each thread has a core of its own.
constexpr std::chrono::microseconds kAtMeetings{100};

}  // namespace

void Count::wake() {
    // Either this sees a thread that is about to sleep, or that thread sees the value.
    if (asleep_.load() == 0) return;
    {
        const std::lock_guard<std::mutex> lock(mutex_);
    }
    woken_.notify_all();
}

void Count::wait(std::uint64_t value, std::chrono::nanoseconds awake) {
    Clock::time_point limit;
    for (int looks = 0; !reached(value); ++looks) {
        // Whoever waits for this core has it first: perhaps that is the thread that is waited for.
        std::this_thread::yield();
        const auto now = Clock::now();
        if (looks == 0) limit = now + awake;
        if (now < limit) continue;
        std::unique_lock<std::mutex> lock(mutex_);
        ++asleep_;
        woken_.wait(lock, [&] { return value_.load() >= value; });
        --asleep_;
        return;
    }
}

Team::Team(int count) : count_(count), process_(getpid()), crew_(std::make_unique<Crew>()) {
    try {
        for (int i = 1; i < count; ++i) crew_->threads.emplace_back([this, i] { serve(i); });
    } catch (const std::system_error&) {
        end();
        throw InvalidError("the system gives no more threads");
    }
}

Team::~Team() {
    // In a process that was forked from its own, threads that are not there would never end, nor would those
    // that sleep on a condition ever leave it.
    if (getpid() == process_)
        end();
    else
        static_cast<void>(crew_.release());
}

void Team::check_process() const {
    require(getpid() == process_, "its threads are in the process that this one was forked from");
}

void Team::end() {
    crew_->ended = true;
    crew_->works.add();
    crew_->works.wake();
    for (auto& thread : crew_->threads) thread.join();
}

void Team::run(const std::function<void(int)>& work) {
    if (count_ == 1) return work(0);
    crew_->work = &work;
    crew_->works.add();
    crew_->works.wake();
    work(0);
    meet();
}

void Team::wait(std::uint64_t arrivals) { crew_->arrivals.wait(arrivals, kAtMeetings); }

std::uint64_t Team::arrive() {
    const auto size = static_cast<std::uint64_t>(count_);
    const std::uint64_t arrivals = crew_->arrivals.add();
    if (arrivals % size != 0) return arrivals + size - arrivals % size;
    crew_->arrivals.wake();
    return arrivals;
}

void Team::serve(int index) {
    const bool shares = count_ > static_cast<int>(std::thread::hardware_concurrency());
    for (std::uint64_t next = 1;; ++next) {
        crew_->works.wait(next, shares ? std::chrono::microseconds{0} : kBetweenSteps);
        if (crew_->ended) return;
        (*crew_->work)(index);
        meet();
    }
}

}  // namespace bedplate
