// Weights as kernels read them, made of constants as data files hold them.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "kernels.h"
#include "memory.h"

namespace bedplate {

// Bytes of a constant, not ours.
struct Bytes {
    const std::uint8_t* data;
    std::size_t size;
};

// A constant of a linear: codes or floats row by row, as `quantize/packing.py` lays them out.
//
// bits 4: two codes a byte, 8 more than the code, the even column in the low half; scales are bfloat16 [rows,
// columns / group], or float32 [rows] with group 0. bits 8: int8, scales float32 [rows]. bits 32: float32, no
// scales.
struct Constants {
    std::int64_t rows, columns;
    int bits;
    std::int64_t group;
    Bytes codes, scales;
};

// One offset for each group of each row, as a correction holds them: int8 [rows, rank], float32 scales
// [rows], of which the first columns / group count; what is stored is divided by `unit`.
struct Offsets {
    std::int64_t rank, group;
    float unit;
    Bytes codes, scales;
};

// Weights [rows, columns] for `Kernels::product`. InvalidError: sizes do not fit each other.
class Matrix {
  public:
    Matrix(const Constants& constants, const std::optional<Offsets>& offsets,
           const std::optional<Bytes>& bias);
    // Rows of several constants of one kind, one below the other.
    explicit Matrix(const std::vector<Constants>& parts);
    Matrix(const Matrix&) = delete;
    Matrix& operator=(const Matrix&) = delete;

    std::int64_t rows() const { return view_.rows; }
    std::int64_t columns() const { return view_.columns; }
    std::int64_t blocks() const { return (view_.rows + kBlock - 1) / kBlock; }
    std::int64_t groups() const { return (view_.columns + kGroup - 1) / kGroup; }
    bool takes_codes() const { return view_.coding != Coding::kFloat; }
    const Weights& view() const { return view_; }
    std::size_t bytes() const;
    // Writes row `row` of 8 bits or floats: an embedding that is stored as the head is.
    void read_row(std::int64_t row, float* out) const;

  private:
    void make_room(const Constants& like, std::int64_t rows);
    void fill(const Constants& constants, std::int64_t first);
    void fill_offsets(const Offsets& offsets);

    Weights view_{};
    Array<std::uint8_t> codes_;
    Array<float> floats_, row_scales_, offset_scales_, bias_;
    Array<std::uint16_t> group_scales_;
    Array<std::int8_t> offsets_;
};

// The wide half of a branch: of a constant of 8 bits or floats, `rank` columns from `column` on. It adds to
// the outputs of the place's linear number `linear`, and takes narrow values from number `narrow` on.
class BackMatrix {
  public:
    BackMatrix(const Constants& constants, std::int64_t column, std::int64_t rank, std::int64_t linear,
               std::int64_t narrow);
    BackMatrix(const BackMatrix&) = delete;
    BackMatrix& operator=(const BackMatrix&) = delete;

    const Back& view() const { return view_; }
    std::int64_t linear() const { return linear_; }
    std::int64_t narrow() const { return narrow_; }
    std::size_t bytes() const { return codes_.bytes() + floats_.bytes() + scales_.bytes(); }

  private:
    Back view_{};
    std::int64_t linear_, narrow_;
    Array<std::int8_t> codes_;
    Array<float> floats_, scales_;
};

// A table that rows are taken of, as it lies in a data file. bits 4: the even column in the high half,
// float32 scales [rows, columns / group]; bits 8: float32 scales [rows]; bits 32: none.
class Table {
  public:
    explicit Table(const Constants& constants);
    Table(const Table&) = delete;
    Table& operator=(const Table&) = delete;

    std::int64_t rows() const { return rows_; }
    std::int64_t columns() const { return columns_; }
    std::size_t bytes() const { return codes_.bytes() + floats_.bytes() + scales_.bytes(); }
    void read_row(std::int64_t row, float* out) const;

  private:
    std::int64_t rows_, columns_, group_;
    int bits_;
    Array<std::uint8_t> codes_;
    Array<float> floats_, scales_;
};

// What the first rows of a matrix of 4 bits come to if row g is that number in the columns of group g, of
// `groups` of equal width, and zero elsewhere; nothing if they are not so. InvalidError: sizes do not fit
// each other.
std::optional<float> unit_of_groups(const Constants& constants, std::int64_t groups);

}  // namespace bedplate
