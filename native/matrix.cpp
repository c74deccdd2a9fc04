#include "matrix.h"

#include <algorithm>
#include <cstring>

namespace bedplate {
namespace {

constexpr std::int64_t kMost = std::int64_t(1) << 24;        // rows or columns: more are nobody's weights
constexpr std::int64_t kFourBytes = 256, kEightBytes = 512;  // of a block's group

std::int64_t whole(std::int64_t count, std::int64_t unit) { return (count + unit - 1) / unit; }

void check_sizes(const Constants& c, std::int64_t bytes_of_scale) {
    require(c.rows >= 1 && c.rows <= kMost && c.columns >= 1 && c.columns <= kMost,
            "a matrix has a size out of bounds");
    require(c.bits == 4 || c.bits == 8 || c.bits == 32, "weights have 4, 8 or 32 bits");
    require(c.group == 0 || (c.bits == 4 && c.group > 0 && c.group % kGroup == 0 && c.columns % c.group == 0),
            "a group of columns is no multiple of 32, or does not divide the columns");
    require(c.bits != 4 || c.columns % 2 == 0, "4 bits take an even number of columns");
    const auto bits = static_cast<std::size_t>(c.rows * c.columns) * static_cast<std::size_t>(c.bits);
    require(c.codes.size == bits / 8, "the bytes of a matrix do not fit its shape");
    const std::int64_t scales = c.bits == 32 ? 0 : c.rows * (c.group == 0 ? 1 : c.columns / c.group);
    require(c.scales.size == static_cast<std::size_t>(scales * bytes_of_scale),
            "the scales of a matrix do not fit its shape");
}

float float_at(const Bytes& from, std::int64_t i) {
    float x;
    std::memcpy(&x, from.data + i * 4, 4);
    return x;
}

// Of 8 columns first the even ones, then the odd: as the inputs' codes stand.
std::int64_t place_in_group(std::int64_t column) { return column / 8 * 8 + column % 2 * 4 + column % 8 / 2; }

// The 4 bits of one row's group: 16 bytes, of which each 4 go to a word of their own.
void fill_four(const std::uint8_t* from, std::int64_t count, std::uint8_t* block, std::int64_t lane) {
    std::uint8_t group[kGroup / 2];
    std::memset(group, 0x88, sizeof group);  // codes of zero
    std::memcpy(group, from, static_cast<std::size_t>(count));
    for (std::int64_t j = 0; j < 4; ++j) std::memcpy(block + j * 64 + lane * 4, group + j * 4, 4);
}

// Of 8 bytes the even ones, in order.
std::uint32_t even_bytes(std::uint64_t x) {
    x &= 0x00ff00ff00ff00ff;
    x = (x | x >> 8) & 0x0000ffff0000ffff;
    return static_cast<std::uint32_t>(x | x >> 16);
}

void fill_eight(const std::uint8_t* from, std::int64_t count, std::uint8_t* block, std::int64_t lane) {
    std::uint8_t group[kGroup] = {};
    std::memcpy(group, from, static_cast<std::size_t>(count));
    for (std::int64_t j = 0; j < kGroup / 8; ++j) {
        std::uint64_t eight;
        std::memcpy(&eight, group + j * 8, 8);
        eight ^= 0x8080808080808080;
        const std::uint32_t even = even_bytes(eight), odd = even_bytes(eight >> 8);
        std::memcpy(block + j * 128 + lane * 4, &even, 4);
        std::memcpy(block + j * 128 + 64 + lane * 4, &odd, 4);
    }
}

}  // namespace

Matrix::Matrix(const Constants& constants, const std::optional<Offsets>& offsets,
               const std::optional<Bytes>& bias) {
    make_room(constants, constants.rows);
    fill(constants, 0);
    if (offsets) fill_offsets(*offsets);
    if (!bias) return;
    require(bias->size == static_cast<std::size_t>(constants.rows) * 4, "a bias does not fit its matrix");
    bias_ = Array<float>(static_cast<std::size_t>(blocks() * kBlock));
    std::memcpy(bias_.data(), bias->data, bias->size);
    view_.bias = bias_.data();
}

Matrix::Matrix(const std::vector<Constants>& parts) {
    require(!parts.empty(), "a matrix of no parts");
    std::int64_t rows = 0;
    for (const auto& part : parts) {
        require(
            part.columns == parts[0].columns && part.bits == parts[0].bits && part.group == parts[0].group,
            "parts of a matrix are of several kinds");
        require(part.rows >= 1 && part.rows <= kMost, "a matrix has a size out of bounds");
        rows += part.rows;
    }
    make_room(parts[0], rows);
    std::int64_t first = 0;
    for (const auto& part : parts) {
        fill(part, first);
        first += part.rows;
    }
}

void Matrix::make_room(const Constants& like, std::int64_t rows) {
    check_sizes(like, like.group == 0 ? 4 : 2);
    view_.rows = rows;
    view_.columns = like.columns;
    const std::int64_t lanes = blocks() * kBlock, in_groups = lanes * groups();
    if (like.bits == 32) {
        view_.coding = Coding::kFloat;
        floats_ = Array<float>(static_cast<std::size_t>(lanes * like.columns));
        view_.floats = floats_.data();
        return;
    }
    view_.coding = like.bits == 4 ? Coding::kFour : Coding::kEight;
    codes_ = Array<std::uint8_t>(
        static_cast<std::size_t>(blocks() * groups() * (like.bits == 4 ? kFourBytes : kEightBytes)));
    view_.codes = codes_.data();
    if (like.group == 0) {
        row_scales_ = Array<float>(static_cast<std::size_t>(lanes));
        view_.row_scales = row_scales_.data();
    } else {
        group_scales_ = Array<std::uint16_t>(static_cast<std::size_t>(in_groups));
        view_.group_scales = group_scales_.data();
    }
}

void Matrix::fill(const Constants& c, std::int64_t first) {
    check_sizes(c, c.group == 0 ? 4 : 2);
    const std::int64_t row_bytes = c.columns * c.bits / 8, n_groups = groups();
    for (std::int64_t r = 0; r < c.rows; ++r) {
        const std::uint8_t* from = c.codes.data + r * row_bytes;
        const std::int64_t block = (first + r) / kBlock, lane = (first + r) % kBlock;
        if (c.bits == 32) {
            float* to = floats_.data() + block * c.columns * kBlock + lane;
            for (std::int64_t i = 0; i < c.columns; ++i) to[i * kBlock] = float_at({from, 0}, i);
            continue;
        }
        for (std::int64_t g = 0; g < n_groups; ++g) {
            const std::int64_t columns = std::min<std::int64_t>(kGroup, c.columns - g * kGroup);
            const std::int64_t at = block * n_groups + g;
            if (c.bits == 4)
                fill_four(from + g * kGroup / 2, columns / 2, codes_.data() + at * kFourBytes, lane);
            else
                fill_eight(from + g * kGroup, columns, codes_.data() + at * kEightBytes, lane);
            if (c.group == 0) continue;
            const std::int64_t scale = r * (c.columns / c.group) + g * kGroup / c.group;
            std::memcpy(&group_scales_[static_cast<std::size_t>(at * kBlock + lane)],
                        c.scales.data + scale * 2, 2);
        }
        if (c.group == 0) row_scales_[static_cast<std::size_t>(first + r)] = float_at(c.scales, r);
    }
}

void Matrix::fill_offsets(const Offsets& offsets) {
    require(view_.group_scales != nullptr, "offsets beside a matrix without groups");
    require(offsets.group > 0 && offsets.group % kGroup == 0 && view_.columns % offsets.group == 0,
            "offsets of groups that do not divide the columns");
    require(offsets.rank >= view_.columns / offsets.group && offsets.rank <= kMost,
            "fewer offsets than groups");
    require(offsets.codes.size == static_cast<std::size_t>(view_.rows * offsets.rank) &&
                offsets.scales.size == static_cast<std::size_t>(view_.rows) * 4,
            "offsets do not fit their matrix");
    offsets_ = Array<std::int8_t>(static_cast<std::size_t>(blocks() * groups() * kBlock));
    offset_scales_ = Array<float>(static_cast<std::size_t>(blocks() * kBlock));
    view_.offsets = offsets_.data();
    view_.offset_scales = offset_scales_.data();
    for (std::int64_t r = 0; r < view_.rows; ++r) {
        const std::int64_t block = r / kBlock, lane = r % kBlock;
        offset_scales_[static_cast<std::size_t>(r)] = float_at(offsets.scales, r) * offsets.unit;
        for (std::int64_t g = 0; g < groups(); ++g)
            offsets_[static_cast<std::size_t>((block * groups() + g) * kBlock + lane)] =
                static_cast<std::int8_t>(offsets.codes.data[r * offsets.rank + g * kGroup / offsets.group]);
    }
}

std::size_t Matrix::bytes() const {
    return codes_.bytes() + floats_.bytes() + row_scales_.bytes() + offset_scales_.bytes() + bias_.bytes() +
           group_scales_.bytes() + offsets_.bytes();
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

BackMatrix::BackMatrix(const Constants& c, std::int64_t column, std::int64_t rank, std::int64_t linear,
                       std::int64_t narrow)
    : linear_(linear), narrow_(narrow) {
    check_sizes(c, 4);
    require(c.bits != 4, "the wide half of a branch has 8 or 32 bits");
    require(column >= 0 && rank >= 1 && rank <= c.columns && column <= c.columns - rank,
            "a branch takes columns that are not there");
    require(narrow >= 0, "a branch takes narrow values that are not there");
    view_.rows = c.rows;
    view_.rank = rank;
    const std::int64_t lanes = whole(c.rows, kBlock) * kBlock;
    const auto size = static_cast<std::size_t>(lanes * rank);
    if (c.bits == 8) {
        codes_ = Array<std::int8_t>(size);
        scales_ = Array<float>(static_cast<std::size_t>(lanes));
        std::memcpy(scales_.data(), c.scales.data, c.scales.size);
        view_.codes = codes_.data();
        view_.scales = scales_.data();
    } else {
        floats_ = Array<float>(size);
        view_.floats = floats_.data();
    }
    for (std::int64_t r = 0; r < c.rows; ++r)
        for (std::int64_t j = 0; j < rank; ++j) {
            const auto to = static_cast<std::size_t>((r / kBlock * rank + j) * kBlock + r % kBlock);
            const std::int64_t from = r * c.columns + column + j;
            if (c.bits == 8)
                codes_[to] = static_cast<std::int8_t>(c.codes.data[from]);
            else
                floats_[to] = float_at(c.codes, from);
        }
}

Table::Table(const Constants& c) : rows_(c.rows), columns_(c.columns), group_(c.group), bits_(c.bits) {
    check_sizes(c, 4);
    if (bits_ == 32) {
        floats_ = Array<float>(static_cast<std::size_t>(rows_ * columns_));
        std::memcpy(floats_.data(), c.codes.data, c.codes.size);
        return;
    }
    codes_ = Array<std::uint8_t>(c.codes.size);
    scales_ = Array<float>(c.scales.size / 4);
    std::memcpy(codes_.data(), c.codes.data, c.codes.size);
    std::memcpy(scales_.data(), c.scales.data, c.scales.size);
}

void Table::read_row(std::int64_t row, float* out) const {
    if (bits_ == 32) {
        std::memcpy(out, floats_.data() + row * columns_, static_cast<std::size_t>(columns_) * 4);
        return;
    }
    const std::uint8_t* codes = codes_.data() + row * columns_ * bits_ / 8;
    const std::int64_t group = group_ == 0 ? columns_ : group_;
    const float* scales = scales_.data() + row * (columns_ / group);
    for (std::int64_t c = 0; c < columns_; ++c) {
        const int four = c % 2 == 0 ? codes[c / 2] >> 4 : codes[c / 2] & 15;
        const int code = bits_ == 4 ? four - 8 : static_cast<std::int8_t>(codes[c]);
        out[c] = static_cast<float>(code) * scales[c / group];
    }
}

std::optional<float> unit_of_groups(const Constants& c, std::int64_t groups) {
    check_sizes(c, c.group == 0 ? 4 : 2);
    if (c.bits != 4 || c.group == 0 || groups < 1 || groups > c.rows || c.columns % groups != 0)
        return std::nullopt;
    const std::int64_t width = c.columns / groups;
    std::optional<float> unit;
    for (std::int64_t g = 0; g < groups; ++g)
        for (std::int64_t i = 0; i < c.columns; ++i) {
            const std::uint8_t both = c.codes.data[(g * c.columns + i) / 2];
            const int code = (i % 2 == 0 ? both & 15 : both >> 4) - 8;
            const std::int64_t scale_at = g * (c.columns / c.group) + i / c.group;
            const std::uint32_t bits =
                static_cast<std::uint32_t>(c.scales.data[scale_at * 2] | c.scales.data[scale_at * 2 + 1] << 8)
                << 16;
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
