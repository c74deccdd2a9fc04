// Floats → codes, for a foundation that is being built.
#pragma once

#include <cstdint>

namespace bedplate {

// 4-bit codes [rows, columns] of float32 values, with scales and offsets [rows, columns / group]: see
// Kernels::cover_groups. importance: of the columns; null: all are as important.
void quantize_with_offsets(const float* values, std::int64_t rows, std::int64_t columns, std::int64_t group,
                           const float* importance, std::int8_t* codes, float* scales, float* offsets);

// Σ x² of each row.
void squares(const float* values, std::int64_t rows, std::int64_t columns, float* found);

}  // namespace bedplate
