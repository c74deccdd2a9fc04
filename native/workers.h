// Threads for ExecuTorch's pool that stay awake while a step runs.
//
// The pool's own sleep after 1,000 pauses without work. One thread takes as long to set a delegate up, twenty
// times and more in a step, and waking them costs more than what they do for a single token.
#pragma once

#include <cstddef>

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

}  // namespace bedplate
