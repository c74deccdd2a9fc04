#include "logits.h"

#include <utility>

namespace bedplate {

std::unique_ptr<float[]> Spare::take(std::size_t size) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (size_ != size) return std::unique_ptr<float[]>(new float[size]);
    size_ = 0;
    return std::move(data_);
}

void Spare::give(std::unique_ptr<float[]> data, std::size_t size) {
    const std::lock_guard<std::mutex> lock(mutex_);
    data_ = std::move(data);
    size_ = size;
}

}  // namespace bedplate
