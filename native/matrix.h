// Weights as kernels read them, made of constants as data files hold them.
//
// They are made in two steps: whoever makes one gives what it is made of, and its sizes are checked.
// `read_all` then reads many of them together, on several threads.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "kernels.h"
#include "source.h"

namespace bedplate {

// How many units hold `count`.
inline std::int64_t whole(std::int64_t count, std::int64_t unit) { return (count + unit - 1) / unit; }

// A constant of a linear: codes or floats row by row, as `quantize/packing.py` lays them out.
//
// bits 4: two codes a byte, 8 more than the code, the even column in the low half; scales are bfloat16 [rows,
// columns / group], or float32 [rows] with group 0. bits 8: int8, scales float32 [rows]. bits 32: float32, no
// scales.
struct Constants {
    std::int64_t rows, columns;
    int bits;
    std::int64_t group;
    Source codes, scales;

    std::int64_t row_bytes() const { return columns * bits / 8; }
};

// One offset for each group of each row, as a correction holds them: int8 [rows, rank], float32 scales
// [rows], of which the first columns / group count; what is stored is divided by `unit`.
struct Offsets {
    std::int64_t rank, group;
    float unit;
    Source codes, scales;
};

// What is read from files into memory of its own, in pieces.
class Readable {
  public:
    Readable() = default;
    virtual ~Readable() = default;
    Readable(const Readable&) = delete;
    Readable& operator=(const Readable&) = delete;

    // Of the memory that it takes.
    virtual std::size_t bytes() const = 0;

  private:
    friend void read_all(const std::vector<Readable*>&, int);
    virtual void place(Pieces& memory) = 0;
    virtual std::int64_t pieces() const = 0;
    // scratch: of the calling thread.
    virtual void read(std::int64_t piece, std::vector<std::uint8_t>& scratch) = 0;

    std::shared_ptr<const Region> memory_;  // null: not read yet
};

// Reads what was not read yet, on so many threads, into one region of memory. InvalidError: a file ends too
// early.
void read_all(const std::vector<Readable*>& wanted, int threads);

// Weights [rows, columns] for `Kernels::product`: rows of constants of one kind, one below the other; of one
// alone, there may be offsets and a bias float32 [rows]. InvalidError: sizes do not fit each other.
class Matrix : public Readable {
  public:
    Matrix(std::vector<Constants> parts, const std::optional<Offsets>& offsets,
           const std::optional<Source>& bias);

    std::int64_t rows() const { return view_.rows; }
    std::int64_t columns() const { return view_.columns; }
    std::int64_t blocks() const { return whole(view_.rows, kBlock); }
    std::int64_t groups() const { return whole(view_.columns, kGroup); }
    bool takes_codes() const { return view_.coding != Coding::kFloat; }
    const Weights& view() const { return view_; }
    std::size_t bytes() const override;
    // Writes row `row` of 8 bits or floats: an embedding that is stored as the head is.
    void read_row(std::int64_t row, float* out) const;

  private:
    Weights placed(Pieces& memory) const;
    std::int64_t run() const;
    void place(Pieces& memory) override { view_ = placed(memory); }
    std::int64_t pieces() const override;
    void read(std::int64_t piece, std::vector<std::uint8_t>& scratch) override;
    void read_codes(const Constants& part, std::int64_t row, std::int64_t first, std::int64_t count,
                    std::vector<std::uint8_t>& scratch);

    std::vector<Constants> parts_;
    std::optional<Offsets> offsets_;
    std::optional<Source> bias_;
    Weights view_{};
};

// The wide half of a branch: of a constant of 8 bits or floats, `rank` columns from `column` on. It adds to
// the outputs of the place's linear number `linear`, and takes narrow values from number `narrow` on.
class BackMatrix : public Readable {
  public:
    BackMatrix(const Constants& constants, std::int64_t column, std::int64_t rank, std::int64_t linear,
               std::int64_t narrow);

    const Back& view() const { return view_; }
    std::int64_t linear() const { return linear_; }
    std::int64_t narrow() const { return narrow_; }
    std::size_t bytes() const override;

  private:
    Back placed(Pieces& memory) const;
    void place(Pieces& memory) override { view_ = placed(memory); }
    std::int64_t pieces() const override { return 1; }
    void read(std::int64_t piece, std::vector<std::uint8_t>& scratch) override;

    Constants constants_;
    std::int64_t column_, linear_, narrow_;
    Back view_{};
};

// A table that rows are taken of, as it lies in a data file. bits 4: the even column in the high half,
// float32 scales [rows, columns / group]; bits 8: float32 scales [rows]; bits 32: none.
class Table : public Readable {
  public:
    explicit Table(const Constants& constants);

    std::int64_t rows() const { return constants_.rows; }
    std::int64_t columns() const { return constants_.columns; }
    std::size_t bytes() const override;
    void read_row(std::int64_t row, float* out) const;

  private:
    void place(Pieces& memory) override;
    std::int64_t pieces() const override;
    void read(std::int64_t piece, std::vector<std::uint8_t>& scratch) override;

    Constants constants_;
    std::uint8_t* codes_ = nullptr;
    float* scales_ = nullptr;
};

// What the first rows of a matrix of 4 bits come to if row g is that number in the columns of group g, of
// `groups` of equal width, and zero elsewhere; nothing if they are not so. InvalidError: sizes do not fit
// each other.
std::optional<float> unit_of_groups(const Constants& constants, std::int64_t groups);

}  // namespace bedplate
