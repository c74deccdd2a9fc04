#pragma once

#include <cstddef>
#include <memory>
#include <optional>

namespace bedplate {

// Float32 [rows, columns] in the order of the program's last two output dimensions.
struct Logits {
    std::unique_ptr<float[]> data;
    std::size_t rows, columns;

    // The column of the highest value of the last row, the first of equal ones; nothing if one is NaN, or no
    // row is there.
    std::optional<std::size_t> likeliest() const;
};

}  // namespace bedplate
