#include "logits.h"

#include <utility>

namespace bedplate {

// Nobody waits: where another has the lock, it is not worth it, and a process that was forked meanwhile would
// wait for ever.
std::unique_ptr<float[]> Spare::take(std::size_t size) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock || size_ != size) return std::unique_ptr<float[]>(new float[size]);
    size_ = 0;
    return std::move(data_);
}

void Spare::give(std::unique_ptr<float[]> data, std::size_t size) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock) return;
    data_ = std::move(data);
    size_ = size;
}

}  // namespace bedplate
