#include "packing.h"

#include <algorithm>
#include <vector>

#include "instruction_sets.h"

namespace bedplate {

void quantize_with_offsets(const float* values, std::int64_t rows, std::int64_t columns, std::int64_t group,
                           const float* importance, std::int8_t* codes, float* scales, float* offsets) {
    const Kernels& kernels = current_kernels();
    const std::int64_t groups = columns / group;
    std::vector<float> side_by_side(static_cast<std::size_t>(group * kBlock));
    std::vector<std::int8_t> found(side_by_side.size());
    const std::vector<float> equal(importance == nullptr ? static_cast<std::size_t>(group) : 0, 1.0f);
    float scale[kBlock], offset[kBlock];
    for (std::int64_t first = 0; first < rows; first += kBlock)
        for (std::int64_t g = 0; g < groups; ++g) {
            // What is beyond the last row stays what it was, and is not looked at.
            const std::int64_t count = std::min<std::int64_t>(kBlock, rows - first), at = g * group;
            for (std::int64_t r = 0; r < count; ++r)
                for (std::int64_t i = 0; i < group; ++i)
                    side_by_side[i * kBlock + r] = values[(first + r) * columns + at + i];
            const Groups some{side_by_side.data(), importance == nullptr ? equal.data() : importance + at,
                              group};
            kernels.cover_groups(some, found.data(), scale, offset);
            for (std::int64_t r = 0; r < count; ++r) {
                for (std::int64_t i = 0; i < group; ++i)
                    codes[(first + r) * columns + at + i] = found[i * kBlock + r];
                scales[(first + r) * groups + g] = scale[r];
                offsets[(first + r) * groups + g] = offset[r];
            }
        }
}

void squares(const float* values, std::int64_t rows, std::int64_t columns, float* found) {
    const Kernels& kernels = current_kernels();
    for (std::int64_t row = 0; row < rows; ++row)
        found[row] = static_cast<float>(kernels.square(values + row * columns, columns));
}

}  // namespace bedplate
