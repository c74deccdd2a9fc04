#include "logits.h"

#include <algorithm>
#include <limits>

namespace bedplate {

namespace {

constexpr std::size_t kLanes = 32;  // independent maxima, so that the compiler takes several at a time

// The highest of `count` values; NaN if one is.
float highest(const float* values, std::size_t count) {
    float lanes[kLanes];
    int nan[kLanes] = {};
    std::fill(lanes, lanes + kLanes, -std::numeric_limits<float>::infinity());
    const std::size_t whole = count / kLanes * kLanes;
    for (std::size_t at = 0; at < whole; at += kLanes)
        for (std::size_t lane = 0; lane < kLanes; ++lane) {
            const float value = values[at + lane];
            lanes[lane] = value > lanes[lane] ? value : lanes[lane];
            nan[lane] |= value != value;
        }
    for (std::size_t at = whole; at < count; ++at) {
        lanes[0] = std::max(lanes[0], values[at]);
        nan[0] |= values[at] != values[at];
    }
    if (std::any_of(nan, nan + kLanes, [](int found) { return found != 0; }))
        return std::numeric_limits<float>::quiet_NaN();
    return *std::max_element(lanes, lanes + kLanes);
}

}  // namespace

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

std::optional<std::size_t> Logits::likeliest() const {
    if (rows == 0) return std::nullopt;
    const float* row = data.get() + (rows - 1) * columns;
    const float* found = std::find(row, row + columns, highest(row, columns));  // NaN equals nothing
    if (found == row + columns) return std::nullopt;
    return static_cast<std::size_t>(found - row);
}

}  // namespace bedplate
