#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <optional>

namespace bedplate {

// The memory of the last logits that were given up, for the next of that size: pages that the system hands
// out anew cost a step of eight sessions a fifth of its time.
class Spare {
  public:
    std::unique_ptr<float[]> take(std::size_t size);
    void give(std::unique_ptr<float[]> data, std::size_t size);

  private:
    std::mutex mutex_;
    std::unique_ptr<float[]> data_;
    std::size_t size_ = 0;
};

// Float32 [rows, columns] of the wanted rows of a step.
struct Logits {
    Logits(std::shared_ptr<Spare> from, std::size_t row_count, std::size_t column_count)
        : rows(row_count), columns(column_count), data(from->take(rows * columns)), spare(std::move(from)) {}
    Logits(Logits&&) = default;
    ~Logits() {
        if (data != nullptr) spare->give(std::move(data), rows * columns);
    }

    std::size_t rows, columns;
    std::unique_ptr<float[]> data;
    std::shared_ptr<Spare> spare;

    // The column of the highest value of the last row, the first of equal ones; nothing if one is NaN, or no
    // row is there.
    std::optional<std::size_t> likeliest() const;
};

}  // namespace bedplate
