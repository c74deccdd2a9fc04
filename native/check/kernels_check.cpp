// A program that checks the kernels of every instruction set that the machine has against plain loops in
// double.
//
// Python's tests do the same and more; this one runs where Python's modules are not at hand: cross-compiled,
// under an emulator (`make test-arm`). It prints a line for each set and ends with 1 if a result is off.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "../instruction_sets.h"
#include "../matrix.h"

namespace {

using namespace bedplate;

std::mt19937 random_bits(1);

float uniform() { return static_cast<float>(random_bits()) / 4294967296.0f * 2.0f - 1.0f; }

// Where the bytes lie in a file.
Source stored(const std::vector<std::uint8_t>& data) {
    static std::FILE* const file = std::tmpfile();
    const long offset = (std::fseek(file, 0, SEEK_END), std::ftell(file));
    std::fwrite(data.data(), 1, data.size(), file);
    std::fflush(file);
    return {fileno(file), offset, static_cast<std::int64_t>(data.size())};
}

std::vector<std::uint8_t> noise(std::size_t size) {
    std::vector<std::uint8_t> data(size);
    for (auto& byte : data) byte = static_cast<std::uint8_t>(random_bits());
    return data;
}

template <class T>
std::vector<std::uint8_t> raw(const std::vector<T>& values) {
    const auto* data = reinterpret_cast<const std::uint8_t*>(values.data());
    return {data, data + values.size() * sizeof(T)};
}

// Inputs as kernels see them, and what each of them stands for.
struct Quantized {
    std::vector<float> floats;
    Array<std::int8_t> codes;
    Array<InputGroup> input_groups;
    std::int64_t columns, groups;

    Quantized(const Kernels& kernels, std::int64_t rows, std::int64_t columns_)
        : floats(static_cast<std::size_t>(rows * columns_)), columns(columns_), groups((columns_ + 31) / 32) {
        for (auto& x : floats) x = uniform();
        const auto size = static_cast<std::size_t>((rows + kSide - 1) / kSide * kSide * groups);
        codes = Array<std::int8_t>(size * kGroup);
        input_groups = Array<InputGroup>(size);
        for (std::int64_t i = 0; i < rows; ++i) {
            const std::int64_t place = view().place(i);
            kernels.quantize(floats.data() + i * columns, columns, kSide, codes.data() + place * kGroup,
                             input_groups.data() + place);
        }
    }
    Inputs view() const { return {floats.data(), columns, codes.data(), input_groups.data(), groups, kSide}; }
    double at(std::int64_t row, std::int64_t column) const {
        const std::int64_t in_eight = column % 8,
                           place = column % kGroup / 8 * 8 + in_eight % 2 * 4 + in_eight / 2;
        const auto group = static_cast<std::size_t>(view().place(row) + column / kGroup * kSide);
        return static_cast<double>(codes[group * kGroup + static_cast<std::size_t>(place)]) *
               static_cast<double>(input_groups[group].scale);
    }
};

int failures = 0;

void expect(const char* what, const Kernels& kernels, double found, double wanted, double tolerance) {
    if (std::abs(found - wanted) <= tolerance) return;
    if (++failures <= 20) std::printf("%s, %s: %.10g, not %.10g\n", kernels.name, what, found, wanted);
}

double bfloat16(const std::vector<std::uint8_t>& data, std::int64_t i) {
    const std::uint32_t bits = static_cast<std::uint32_t>(data[static_cast<std::size_t>(2 * i)] |
                                                          data[static_cast<std::size_t>(2 * i + 1)] << 8)
                               << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Every output against a sum in double, and every row alone against the same row among others.
void check_product(const Kernels& kernels, int bits, std::int64_t rows, std::int64_t columns,
                   std::int64_t group) {
    std::vector<std::uint8_t> codes = noise(static_cast<std::size_t>(rows * columns * bits / 8)), scales;
    if (bits == 32) {
        std::vector<float> weights(static_cast<std::size_t>(rows * columns));
        for (auto& w : weights) w = uniform();
        codes = raw(weights);
    } else if (group == 0) {
        std::vector<float> of_rows(static_cast<std::size_t>(rows));
        for (auto& s : of_rows) s = uniform() * 0.01f;
        scales = raw(of_rows);
    } else {
        for (std::int64_t i = 0; i < rows * (columns / group); ++i) {
            scales.push_back(static_cast<std::uint8_t>(random_bits()));
            scales.push_back(0x3c);  // some hundredths
        }
    }
    Matrix matrix({Constants{rows, columns, bits, group, stored(codes), stored(scales)}}, {}, {});
    read_all({&matrix}, 2);
    constexpr std::int64_t kInputs = 11;
    const Quantized inputs(kernels, kInputs, columns);
    const std::int64_t stride = matrix.blocks() * kBlock;
    std::vector<float> together(static_cast<std::size_t>(kInputs * stride)), alone(together.size());
    kernels.product(matrix.view(), inputs.view(), {0, kInputs}, {0, matrix.blocks()}, together.data(), stride,
                    false);
    for (std::int64_t i = 0; i < kInputs; ++i)
        for (std::int64_t b = 0; b < matrix.blocks(); ++b)
            kernels.product(matrix.view(), inputs.view(), {i, i + 1}, {b, b + 1}, alone.data(), stride,
                            false);
    for (std::int64_t i = 0; i < kInputs; ++i)
        for (std::int64_t r = 0; r < rows; ++r) {
            double wanted = 0, size = 0;
            for (std::int64_t c = 0; c < columns; ++c) {
                const auto at = static_cast<std::size_t>(r * columns + c);
                double weight;
                if (bits == 32) {
                    float value;
                    std::memcpy(&value, codes.data() + at * 4, 4);
                    weight = value;
                } else {
                    const int code = bits == 8 ? static_cast<std::int8_t>(codes[at])
                                               : (c % 2 ? codes[at / 2] >> 4 : codes[at / 2] & 15) - 8;
                    float row_scale;
                    if (group == 0) std::memcpy(&row_scale, scales.data() + r * 4, 4);
                    weight = code * (group == 0 ? static_cast<double>(row_scale)
                                                : bfloat16(scales, r * (columns / group) + c / group));
                }
                const double x =
                    bits == 32 ? static_cast<double>(inputs.floats[static_cast<std::size_t>(i * columns + c)])
                               : inputs.at(i, c);
                wanted += weight * x;
                size += std::abs(weight * x);
            }
            const auto at = static_cast<std::size_t>(i * stride + r);
            // Each of the sum's terms is rounded a few times to 24 bits.
            expect("product", kernels, together[at], wanted, 1e-6 * size);
            expect("row alone", kernels, alone[at], together[at], 0.0);
        }
}

void check_attention(const Kernels& kernels, std::int64_t group, std::int64_t dim, std::int64_t count,
                     bool half) {
    const Heads heads{group, dim, 1.0f / std::sqrt(static_cast<float>(dim)), 0.0f, half};
    const std::int64_t blocks = (count + kPositions - 1) / kPositions;
    const auto size = static_cast<std::size_t>(blocks * kPositions * dim) + 64;
    std::vector<float> keys(size), values(size), k(size), v(size), q(static_cast<std::size_t>(group * dim));
    for (auto* floats : {&k, &v, &q})
        for (auto& x : *floats) x = std::round(uniform() * 256.0f) / 64.0f;  // exact in float16
    // Blocks lie side by side: in float16 they leave half of their room.
    const auto block = [&](std::vector<float>& of, std::int64_t number) {
        return of.data() + number * kPositions * dim;
    };
    for (std::int64_t p = 0; p < count; ++p)
        kernels.keep(heads, k.data() + p * dim, v.data() + p * dim, p % kPositions,
                     block(keys, p / kPositions), block(values, p / kPositions));
    const std::int64_t floats = group * (2 + dim);
    std::vector<float> states(static_cast<std::size_t>(blocks * floats)), out(q.size());
    std::vector<float> weights(static_cast<std::size_t>(blocks));
    for (std::int64_t b = 0; b < blocks; ++b)
        kernels.attend(heads, q.data(), block(keys, b), block(values, b),
                       {0, std::min<std::int64_t>(kPositions, count - b * kPositions)},
                       states.data() + b * floats, keys.data());
    kernels.join(heads, states.data(), blocks, weights.data(), out.data());
    for (std::int64_t g = 0; g < group; ++g) {
        std::vector<double> weights;
        double sum = 0;
        for (std::int64_t p = 0; p < count; ++p) {
            double score = 0;
            for (std::int64_t d = 0; d < dim; ++d)
                score += static_cast<double>(q[static_cast<std::size_t>(g * dim + d)]) *
                         static_cast<double>(k[static_cast<std::size_t>(p * dim + d)]);
            weights.push_back(std::exp(score * static_cast<double>(heads.scale)));
            sum += weights.back();
        }
        for (std::int64_t d = 0; d < dim; ++d) {
            double wanted = 0;
            for (std::int64_t p = 0; p < count; ++p)
                wanted += weights[static_cast<std::size_t>(p)] / sum *
                          static_cast<double>(v[static_cast<std::size_t>(p * dim + d)]);
            // Scores of some tens, each in error by 2^-22 of itself, and weights by as much.
            expect("attention", kernels, out[static_cast<std::size_t>(g * dim + d)], wanted, 2e-5);
        }
    }
}

// Tokens drawn from the same logits are the same everywhere, so these are the bits that any set gives.
constexpr std::uint32_t kBitsOfMasses = 1347321179;

void check_masses(const Kernels& kernels) {
    std::mt19937 drawn(2);
    std::vector<float> values(1000), weights(8 * kMassBlock), maxima(8), sums(8);
    for (auto& x : values) x = static_cast<float>(drawn() % 65536) / 4096.0f;
    values[3] = -INFINITY;
    expect("all are numbers", kernels, kernels.maxima(values.data(), 1000, maxima.data()), 1.0, 0.0);
    const Candidates all{values.data(), 1000, maxima.data(), *std::max_element(maxima.begin(), maxima.end()),
                         2.0f};
    kernels.masses(all, {0, 8}, 4.0f, sums.data());
    std::uint32_t bits = 0;
    for (std::int64_t b = 0; b < 8; ++b) {
        const auto block = static_cast<std::size_t>(b);
        double sum = 0;
        kernels.weights(all, b, weights.data());
        for (std::int64_t i = b * kMassBlock; i < std::min<std::int64_t>(1000, (b + 1) * kMassBlock); ++i) {
            const auto value = static_cast<double>(values[static_cast<std::size_t>(i)]);
            const double weight = std::exp2((value - static_cast<double>(all.top)) * 2.0);
            expect("weight", kernels, weights[static_cast<std::size_t>(i - b * kMassBlock)], weight,
                   4e-7 * weight);
            if (value >= 4.0) sum += weight;
        }
        expect("mass", kernels, sums[block], sum, 1e-6 * sum);
        std::uint32_t one;
        std::memcpy(&one, &sums[block], 4);
        bits = bits * 31 + one;
    }
    expect("the bits of masses", kernels, bits, kBitsOfMasses, 0.0);
    values[999] = NAN;
    expect("one is no number", kernels, kernels.maxima(values.data(), 1000, maxima.data()), 0.0, 0.0);
}

// A foundation is named by its bytes, so these too are the bits that any set gives.
constexpr std::uint32_t kBitsOfCovers = 1166417341;

void check_covers(const Kernels& kernels) {
    std::mt19937 drawn(3);
    constexpr std::int64_t kCount = 40;
    std::vector<float> values(kCount * kBlock), importance(kCount);
    for (auto& x : values) x = static_cast<float>(drawn() % 65536) / 4096.0f - 9.0f;
    for (auto& x : importance) x = static_cast<float>(drawn() % 256 + 1) / 256.0f;
    std::vector<std::int8_t> codes(values.size());
    float scales[kBlock], offsets[kBlock];
    kernels.cover_groups({values.data(), importance.data(), kCount}, codes.data(), scales, offsets);
    std::uint32_t bits = 0;
    for (std::size_t r = 0; r < kBlock; ++r) {
        double error = 0, weight = 0;
        for (std::size_t i = 0; i < kCount; ++i) {
            const std::size_t at = i * kBlock + r;
            const double off = double(values[at]) - (double(scales[r]) * codes[at] + double(offsets[r]));
            error += off * off * double(importance[i]);
            weight += double(importance[i]);
            bits = bits * 31 + static_cast<std::uint8_t>(codes[at]);
        }
        // No worse than codes over the whole range, 16, with the error of what is rounded evenly.
        expect("error of codes", kernels, std::max(error / weight, 0.1), 0.1, 0.0);
        for (const float number : {scales[r], offsets[r]}) {
            std::uint32_t one;
            std::memcpy(&one, &number, 4);
            bits = bits * 31 + one;
        }
    }
    expect("the bits of covers", kernels, bits, kBitsOfCovers, 0.0);
}

void check(const Kernels& kernels) {
    check_covers(kernels);
    check_masses(kernels);
    for (const std::int64_t rows : {1, 16, 40})
        for (const std::int64_t columns : {32, 96, 288}) {
            for (const std::int64_t group : {0, 32, 96})
                if (group == 0 || columns % group == 0) check_product(kernels, 4, rows, columns, group);
            check_product(kernels, 8, rows, columns, 0);
            check_product(kernels, 32, rows, columns, 0);
            check_product(kernels, 8, rows, columns - 5, 0);
            check_product(kernels, 4, rows, columns - 6, 0);
            check_product(kernels, 32, rows, columns - 5, 0);
        }
    for (const std::int64_t group : {1, 2, 3, 4, 9})
        for (const std::int64_t dim : {8, 24, 64, 128})
            for (const std::int64_t count : {1, 15, 16, 33, 64, 65, 150})
                for (const bool half : {false, true}) check_attention(kernels, group, dim, count, half);
}

}  // namespace

int main() {
    for (const auto& name : instruction_sets()) {
        use_instruction_set(name);
        const int before = failures;
        check(current_kernels());
        std::printf("%s: %s\n", name.c_str(), failures == before ? "as in double" : "WRONG");
    }
    return failures == 0 ? 0 : 1;
}
