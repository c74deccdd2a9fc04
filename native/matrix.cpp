#include "matrix.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <mutex>
#include <set>
#include <system_error>
#include <thread>
#include <utility>

namespace bedplate {
namespace {

constexpr std::int64_t kMost = std::int64_t(1) << 24;  // rows or columns: more are nobody's weights
// What is read at once: a piece of work for a thread, and still in its cache when it is laid out.
constexpr std::int64_t kPieceBytes = 256 * 1024;

void check_sizes(const Constants& c, std::int64_t bytes_of_scale) {
    require(c.rows >= 1 && c.rows <= kMost && c.columns >= 1 && c.columns <= kMost,
            "a matrix has a size out of bounds");
    require(c.bits == 4 || c.bits == 8 || c.bits == 32, "weights have 4, 8 or 32 bits");
    require(c.group == 0 || (c.bits == 4 && c.group > 0 && c.group % kGroup == 0 && c.columns % c.group == 0),
            "a group of columns is no multiple of 32, or does not divide the columns");
    require(c.bits != 4 || c.columns % 2 == 0, "4 bits take an even number of columns");
    require(c.codes.size == c.rows * c.row_bytes(), "the bytes of a matrix do not fit its shape");
    const std::int64_t scales = c.bits == 32 ? 0 : c.rows * (c.group == 0 ? 1 : c.columns / c.group);
    require(c.scales.size == scales * bytes_of_scale, "the scales of a matrix do not fit its shape");
}

std::int64_t bytes_of_scale(const Constants& c) { return c.group == 0 ? 4 : 2; }

// Of 8 columns first the even ones, then the odd: as the inputs' codes stand.
std::int64_t place_in_group(std::int64_t column) { return column / 8 * 8 + column % 2 * 4 + column % 8 / 2; }

// Of 8 bytes the even ones, in order.
std::uint32_t even_bytes(std::uint64_t x) {
    x &= 0x00ff00ff00ff00ff;
    x = (x | x >> 8) & 0x0000ffff0000ffff;
    return static_cast<std::uint32_t>(x | x >> 16);
}

// 8 bits as kernels read them: unsigned, and of each 8 columns first the even ones, then the odd.
void rearrange(std::uint8_t* codes, std::int64_t size) {
    for (std::int64_t i = 0; i < size; i += 8) {
        std::uint64_t eight;
        std::memcpy(&eight, codes + i, 8);
        eight ^= 0x8080808080808080;
        const std::uint32_t words[] = {even_bytes(eight), even_bytes(eight >> 8)};
        std::memcpy(codes + i, words, 8);
    }
}

// The memory behind a view of weights that are being made.
template <class T>
T* to_fill(const T* view) {
    return const_cast<T*>(view);
}

// Calls lay(block, lane, count, row) for rows [first, first + rows), of which `count` from number `row` on
// lie in one block, from its lane `lane` on.
template <class Lay>
void for_blocks(std::int64_t first, std::int64_t rows, Lay lay) {
    for (std::int64_t row = 0, count; row < rows; row += count) {
        const std::int64_t lane = (first + row) % kBlock;
        count = std::min<std::int64_t>(kBlock - lane, rows - row);
        lay((first + row) / kBlock, lane, count, row);
    }
}

template <class T>
struct Vector {
    static constexpr int kItems = 16 / sizeof(T);
    typedef T Items __attribute__((vector_size(16)));

    // Items of a and of b in turns: of the lower half of both (first 0), or of the upper (first kItems / 2).
    template <int first, std::size_t... i>
    static Items in_turns(Items a, Items b, std::index_sequence<i...>) {
        return __builtin_shufflevector(a, b, (first + i / 2 + i % 2 * kItems)...);
    }
};

// The columns of 16 rows of 16 bytes, `stride` bytes apart, one behind the other. To take the items of two
// halves in turns moves the highest bit of each item's number to the lowest place: after four times, that is
// the row's number.
template <class T>
void transpose(const std::uint8_t* from, std::int64_t stride, T* to) {
    using V = Vector<T>;
    constexpr std::make_index_sequence<V::kItems> kAll;
    typename V::Items rows[kBlock], next[kBlock];
    for (int i = 0; i < kBlock; ++i) std::memcpy(&rows[i], from + i * stride, 16);
    for (int bit = 0; bit < 4; ++bit) {
        for (int i = 0; i < kBlock / 2; ++i) {
            next[2 * i] = V::template in_turns<0>(rows[i], rows[i + kBlock / 2], kAll);
            next[2 * i + 1] = V::template in_turns<V::kItems / 2>(rows[i], rows[i + kBlock / 2], kAll);
        }
        std::memcpy(rows, next, sizeof rows);
    }
    std::memcpy(to, rows, sizeof rows);
}

// Rows [first, first + rows) of `columns` values, `stride` values apart → [blocks, columns, 16].
template <class T>
void lay_out(const std::uint8_t* from, std::int64_t stride, std::int64_t columns, std::int64_t first,
             std::int64_t rows, T* to) {
    constexpr std::int64_t kSize = sizeof(T), kAtOnce = Vector<T>::kItems;
    for_blocks(first, rows, [&](std::int64_t block, std::int64_t lane, std::int64_t count, std::int64_t row) {
        const std::uint8_t* begin = from + row * stride * kSize;
        T* out = to + block * columns * kBlock;
        std::int64_t c = 0;
        for (; count == kBlock && c + kAtOnce <= columns; c += kAtOnce)
            transpose(begin + c * kSize, stride * kSize, out + c * kBlock);
        for (; c < columns; ++c)
            for (std::int64_t i = 0; i < count; ++i)
                std::memcpy(out + c * kBlock + lane + i, begin + (i * stride + c) * kSize, sizeof(T));
    });
}

// The same for values of groups of `per` times 32 columns, which are those of each 32 in it.
template <class T>
void lay_out_groups(const std::uint8_t* from, std::int64_t stride, std::int64_t groups, std::int64_t per,
                    std::int64_t first, std::int64_t rows, T* to) {
    if (per == 1) return lay_out(from, stride, groups, first, rows, to);
    std::vector<T> repeated(static_cast<std::size_t>(rows * groups));
    for (std::int64_t i = 0; i < rows * groups; ++i)
        std::memcpy(&repeated[static_cast<std::size_t>(i)],
                    from + (i / groups * stride + i % groups / per) * static_cast<std::int64_t>(sizeof(T)),
                    sizeof(T));
    lay_out(reinterpret_cast<const std::uint8_t*>(repeated.data()), groups, groups, first, rows, to);
}

}  // namespace

void read_all(const std::vector<Readable*>& wanted, int threads) {
    struct Piece {
        Readable* of;
        std::int64_t number;
    };
    std::vector<Readable*> missing;
    std::vector<Piece> pieces;
    std::set<Readable*> seen;
    std::size_t bytes = 0;
    for (Readable* one : wanted) {
        if (one->memory_ != nullptr || !seen.insert(one).second) continue;
        missing.push_back(one);
        bytes += one->bytes();
        for (std::int64_t i = 0; i < one->pieces(); ++i) pieces.push_back({one, i});
    }
    if (missing.empty()) return;
    const auto region = std::make_shared<const Region>(bytes, true);
    Pieces memory(region->data());
    for (Readable* one : missing) one->place(memory);

    std::atomic<std::size_t> next{0};
    std::mutex mutex;
    std::exception_ptr failed;
    const auto work = [&] {
        try {
            std::vector<std::uint8_t> scratch;
            for (std::size_t i; (i = next++) < pieces.size();) pieces[i].of->read(pieces[i].number, scratch);
        } catch (...) {
            next = pieces.size();
            const std::lock_guard<std::mutex> lock(mutex);
            if (!failed) failed = std::current_exception();
        }
    };
    std::vector<std::thread> helpers;
    try {
        for (int i = 1; i < threads; ++i) helpers.emplace_back(work);
    } catch (const std::system_error&) {  // the system gives no more threads: fewer do the same
    }
    work();
    for (auto& helper : helpers) helper.join();
    if (failed) std::rethrow_exception(failed);
    for (Readable* one : missing) one->memory_ = region;
}

// --- Matrix

Matrix::Matrix(std::vector<Constants> parts, const std::optional<Offsets>& offsets,
               const std::optional<Source>& bias)
    : parts_(std::move(parts)), offsets_(offsets), bias_(bias) {
    require(!parts_.empty(), "a matrix of no parts");
    const Constants& like = parts_[0];
    for (const auto& part : parts_) {
        require(part.columns == like.columns && part.bits == like.bits && part.group == like.group,
                "parts of a matrix are of several kinds");
        check_sizes(part, bytes_of_scale(part));
        view_.rows += part.rows;
    }
    view_.columns = like.columns;
    view_.coding = like.bits == 32 ? Coding::kFloat : like.bits == 4 ? Coding::kFour : Coding::kEight;
    require(parts_.size() == 1 || (!offsets && !bias), "offsets and bias belong to a matrix of one part");
    require(!bias || bias->size == view_.rows * 4, "a bias does not fit its matrix");
    if (!offsets) return;
    require(like.group != 0, "offsets beside a matrix without groups");
    require(offsets->group > 0 && offsets->group % kGroup == 0 && view_.columns % offsets->group == 0,
            "offsets of groups that do not divide the columns");
    require(offsets->rank >= view_.columns / offsets->group && offsets->rank <= kMost,
            "fewer offsets than groups");
    require(offsets->codes.size == view_.rows * offsets->rank && offsets->scales.size == view_.rows * 4,
            "offsets do not fit their matrix");
}

// The view with memory of its own, all of it zeros.
Weights Matrix::placed(Pieces& memory) const {
    const std::int64_t lanes = blocks() * kBlock, in_groups = lanes * groups();
    Weights view = view_;
    if (view.coding == Coding::kFloat)
        view.floats = memory.take<float>(lanes * view.columns);
    else
        view.codes = memory.take<std::uint8_t>(blocks() * groups() *
                                               (view.coding == Coding::kFour ? kFourBytes : kEightBytes));
    if (view.coding != Coding::kFloat && parts_[0].group == 0) view.row_scales = memory.take<float>(lanes);
    if (parts_[0].group != 0) view.group_scales = memory.take<std::uint16_t>(in_groups);
    if (offsets_) view.offsets = memory.take<std::int8_t>(in_groups);
    if (offsets_) view.offset_scales = memory.take<float>(lanes);
    if (bias_) view.bias = memory.take<float>(lanes);
    return view;
}

std::size_t Matrix::bytes() const {
    Pieces none(nullptr);
    placed(none);
    return none.used();
}

// Rows that are read at once: whole blocks.
std::int64_t Matrix::run() const {
    return std::max<std::int64_t>(1, kPieceBytes / (parts_[0].row_bytes() * kBlock)) * kBlock;
}

std::int64_t Matrix::pieces() const {
    std::int64_t count = 0;
    for (const auto& part : parts_) count += whole(part.rows, run());
    return count;
}

void Matrix::read(std::int64_t piece, std::vector<std::uint8_t>& scratch) {
    std::int64_t first = 0;  // row of the part, in the matrix
    auto part = parts_.begin();
    for (; piece >= whole(part->rows, run()); ++part) {
        piece -= whole(part->rows, run());
        first += part->rows;
    }
    const std::int64_t row = piece * run(), count = std::min(run(), part->rows - row);
    first += row;
    read_codes(*part, row, first, count, scratch);
    if (part->group != 0) {
        const std::int64_t wide = view_.columns / part->group;
        scratch.resize(static_cast<std::size_t>(count * wide * 2));
        part->scales.read(row * wide * 2, count * wide * 2, scratch.data());
        lay_out_groups(scratch.data(), wide, groups(), part->group / kGroup, first, count,
                       to_fill(view_.group_scales));
    } else if (part->bits != 32) {
        part->scales.read(row * 4, count * 4, to_fill(view_.row_scales) + first);
    }
    if (offsets_) {
        scratch.resize(static_cast<std::size_t>(count * offsets_->rank));
        offsets_->codes.read(row * offsets_->rank, count * offsets_->rank, scratch.data());
        lay_out_groups(scratch.data(), offsets_->rank, groups(), offsets_->group / kGroup, first, count,
                       to_fill(view_.offsets));
        float* const scales = to_fill(view_.offset_scales) + first;
        offsets_->scales.read(row * 4, count * 4, scales);
        for (std::int64_t i = 0; i < count; ++i) scales[i] *= offsets_->unit;
    }
    if (bias_) bias_->read(row * 4, count * 4, to_fill(view_.bias) + first);
}

// A block of codes is words of 4 bytes, [words of a row, 16].
void Matrix::read_codes(const Constants& part, std::int64_t row, std::int64_t first, std::int64_t count,
                        std::vector<std::uint8_t>& scratch) {
    const std::int64_t stored = part.row_bytes();
    const std::int64_t wide = part.bits == 32 ? stored : groups() * kGroup * part.bits / 8;
    scratch.resize(static_cast<std::size_t>(count * wide));
    part.codes.read(row * stored, count * stored, scratch.data());
    if (part.bits == 32)
        return lay_out(scratch.data(), view_.columns, view_.columns, first, count, to_fill(view_.floats));
    for (std::int64_t i = count;
         wide > stored && i-- > 0;) {  // the last group is filled up with codes of zero
        std::uint8_t* const to = scratch.data() + i * wide;
        std::memmove(to, scratch.data() + i * stored, static_cast<std::size_t>(stored));
        std::memset(to + stored, part.bits == 4 ? 0x88 : 0, static_cast<std::size_t>(wide - stored));
    }
    if (part.bits == 8) rearrange(scratch.data(), count * wide);
    lay_out(scratch.data(), wide / 4, wide / 4, first, count,
            reinterpret_cast<std::uint32_t*>(to_fill(view_.codes)));
}

void Matrix::read_row(std::int64_t row, float* out) const {
    const std::int64_t block = row / kBlock, lane = row % kBlock;
    for (std::int64_t c = 0; c < view_.columns; ++c) {
        if (view_.coding == Coding::kFloat) {
            out[c] = view_.floats[(block * view_.columns + c) * kBlock + lane];
            continue;
        }
        const std::int64_t place = place_in_group(c % kGroup);
        const std::uint8_t code =
            view_
                .codes[(block * groups() + c / kGroup) * kEightBytes + place / 4 * 64 + lane * 4 + place % 4];
        out[c] = static_cast<float>(static_cast<int>(code) - 128) * view_.row_scales[row];
    }
}

// --- BackMatrix

BackMatrix::BackMatrix(const Constants& c, std::int64_t column, std::int64_t rank, std::int64_t linear,
                       std::int64_t narrow)
    : constants_(c), column_(column), linear_(linear), narrow_(narrow) {
    check_sizes(c, 4);
    require(c.bits != 4, "the wide half of a branch has 8 or 32 bits");
    require(column >= 0 && rank >= 1 && rank <= c.columns && column <= c.columns - rank,
            "a branch takes columns that are not there");
    require(narrow >= 0, "a branch takes narrow values that are not there");
    view_.rows = c.rows;
    view_.rank = rank;
}

Back BackMatrix::placed(Pieces& memory) const {
    const std::int64_t lanes = whole(view_.rows, kBlock) * kBlock;
    Back view = view_;
    if (constants_.bits == 32) {
        view.floats = memory.take<float>(lanes * view.rank);
        return view;
    }
    view.codes = memory.take<std::int8_t>(lanes * view.rank);
    view.scales = memory.take<float>(lanes);
    return view;
}

std::size_t BackMatrix::bytes() const {
    Pieces none(nullptr);
    placed(none);
    return none.used();
}

void BackMatrix::read(std::int64_t, std::vector<std::uint8_t>& scratch) {
    const Constants& c = constants_;
    scratch.resize(static_cast<std::size_t>(c.codes.size));
    c.codes.read(0, c.codes.size, scratch.data());
    const std::uint8_t* from = scratch.data() + column_ * c.bits / 8;
    if (c.bits == 32) {
        lay_out(from, c.columns, view_.rank, 0, c.rows, to_fill(view_.floats));
        return;
    }
    lay_out(from, c.columns, view_.rank, 0, c.rows, to_fill(view_.codes));
    c.scales.read(0, c.scales.size, to_fill(view_.scales));
}

// --- Table

Table::Table(const Constants& constants) : constants_(constants) { check_sizes(constants, 4); }

std::size_t Table::bytes() const {
    Pieces none(nullptr);
    none.take<std::uint8_t>(constants_.codes.size);
    none.take<float>(constants_.scales.size / 4);
    return none.used();
}

void Table::place(Pieces& memory) {
    codes_ = memory.take<std::uint8_t>(constants_.codes.size);
    scales_ = memory.take<float>(constants_.scales.size / 4);
}

std::int64_t Table::pieces() const { return whole(constants_.codes.size, kPieceBytes) + 1; }

void Table::read(std::int64_t piece, std::vector<std::uint8_t>&) {
    if (piece == pieces() - 1) {
        constants_.scales.read(0, constants_.scales.size, scales_);
        return;
    }
    const std::int64_t at = piece * kPieceBytes;
    constants_.codes.read(at, std::min(kPieceBytes, constants_.codes.size - at), codes_ + at);
}

void Table::read_row(std::int64_t row, float* out) const {
    const std::uint8_t* codes = codes_ + row * constants_.row_bytes();
    if (constants_.bits == 32) {
        std::memcpy(out, codes, static_cast<std::size_t>(constants_.row_bytes()));
        return;
    }
    const std::int64_t width = constants_.group == 0 ? columns() : constants_.group;
    const float* scales = scales_ + row * (columns() / width);
    for (std::int64_t c = 0; c < columns(); ++c) {
        const int four = c % 2 == 0 ? codes[c / 2] >> 4 : codes[c / 2] & 15;
        const int code = constants_.bits == 4 ? four - 8 : static_cast<std::int8_t>(codes[c]);
        out[c] = static_cast<float>(code) * scales[c / width];
    }
}

// --- Directions of offsets

std::optional<float> unit_of_groups(const Constants& c, std::int64_t groups) {
    check_sizes(c, bytes_of_scale(c));
    if (c.bits != 4 || c.group == 0 || groups < 1 || groups > c.rows || c.columns % groups != 0)
        return std::nullopt;
    std::vector<std::uint8_t> codes(static_cast<std::size_t>(groups * c.row_bytes()));
    std::vector<std::uint16_t> scales(static_cast<std::size_t>(groups * (c.columns / c.group)));
    c.codes.read(0, static_cast<std::int64_t>(codes.size()), codes.data());
    c.scales.read(0, static_cast<std::int64_t>(scales.size() * 2), scales.data());
    const std::int64_t width = c.columns / groups;
    std::optional<float> unit;
    for (std::int64_t g = 0; g < groups; ++g)
        for (std::int64_t i = 0; i < c.columns; ++i) {
            const std::uint8_t both = codes[static_cast<std::size_t>((g * c.columns + i) / 2)];
            const int code = (i % 2 == 0 ? both & 15 : both >> 4) - 8;
            const auto scale_at = static_cast<std::size_t>(g * (c.columns / c.group) + i / c.group);
            const std::uint32_t bits = static_cast<std::uint32_t>(scales[scale_at]) << 16;
            float scale;
            std::memcpy(&scale, &bits, sizeof scale);
            const float value = static_cast<float>(code) * scale;
            if (i / width != g) {
                if (value != 0.0f) return std::nullopt;
                continue;
            }
            if (!unit) unit = value;
            if (value != *unit) return std::nullopt;
        }
    return unit;
}

}  // namespace bedplate
