// Compiled once for each instruction set, into namespace BEDPLATE_ISA; see CMakeLists.txt.
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace bedplate::BEDPLATE_ISA {
namespace {

#include "lanes.h"

constexpr int kParts = kBlock / kLanes;  // of a block's rows, one after the other
constexpr int kRowsAtOnce = kRegisters == 32 ? 8 : 4;
constexpr int64_t kFetchAhead =
    4096;  // bytes between asking for weights and their use, where they are used once

// --- Inputs in groups

// Two words of four columns each for 8 columns: the even ones, then the odd.
INLINE void apart(const int8_t* from, int8_t* to) {
    uint64_t x, odd;
    __builtin_memcpy(&x, from, 8);
    odd = x >> 8;
    const auto packed = [](uint64_t bytes) {
        bytes &= 0x00ff00ff00ff00ff;
        bytes = (bytes | bytes >> 8) & 0x0000ffff0000ffff;
        return (bytes | bytes >> 16) & 0x00000000ffffffff;
    };
    x = packed(x) | packed(odd) << 32;
    __builtin_memcpy(to, &x, 8);
}

INLINE void quantize_group(const float* x, int8_t* codes, InputGroup* group) {
    constexpr int kVectors = kGroup / kLanes;
    Floats values[kVectors], most{};
    EACH (i, kVectors) {
        values[i] = load(x + i * kLanes);
        most = larger(most, absolute(values[i]));
    }
    const float range = largest(most);
    const float scale = range / 127.0f;
    const Floats inverse = splat(range > 1e-35f ? 127.0f / range : 0.0f);
    Floats sums{};
    int8_t in_order[kGroup];
    EACH (i, kVectors) {
        const Floats code = rounded(values[i] * inverse);
        sums += code;  // integers, exactly
        const FewBytes bytes = __builtin_convertvector(__builtin_convertvector(code, Ints), FewBytes);
        __builtin_memcpy(in_order + i * kLanes, &bytes, sizeof bytes);
    }
    const float total = sum(sums);
    // A number that is none has no code: it must not pass for a zero.
    const bool known = total == total;
    *group = {known ? scale : total, scale * total, known ? 8 * (int32_t)total : 0};
    EACH (i, kGroup / 8) apart(in_order + 8 * i, codes + 8 * i);
}

void quantize(const float* x, int64_t columns, int64_t side, int8_t* codes, InputGroup* groups) {
    const int64_t whole = columns / kGroup;
    for (int64_t g = 0; g < whole; ++g, codes += side * kGroup, groups += side)
        quantize_group(x + g * kGroup, codes, groups);
    if (whole * kGroup == columns) return;
    float rest[kGroup] = {};
    for (int64_t i = whole * kGroup; i < columns; ++i) rest[i - whole * kGroup] = x[i];
    quantize_group(rest, codes, groups);
}

// --- Products

INLINE Bytes broadcast(const int8_t* word) {
    int32_t four;
    __builtin_memcpy(&four, word, sizeof four);
    return (Bytes)splat(four);
}

// Writes kLanes outputs; `count` of them count.
INLINE void put(float* out, Floats y, int64_t count, bool add) {
    if (count >= kLanes) {
        store(out, add ? load(out) + y : y);
        return;
    }
    for (int64_t i = 0; i < count; ++i) out[i] = add ? out[i] + y[i] : y[i];
}

constexpr int64_t code_bytes(Coding coding) { return coding == Coding::kFour ? kFourBytes : kEightBytes; }

// The sums of one group of columns, for T rows of inputs side by side.
template <Coding C, int T>
INLINE void group_sums(const uint8_t* codes, const int8_t* x, const InputGroup* group, Ints (&totals)[T]) {
    if constexpr (C == Coding::kFour) {
        Sum4 found[T];
        EACH (j, 4) {
            const Bytes both = load_as<Bytes>(codes + j * 64);
            const Bytes low = both & (int8_t)15;
            const Bytes high = (Bytes)((Shorts)both >> 4) & (int8_t)15;
            EACH (t, T) {
                found[t].add(low, broadcast(x + t * kGroup + 8 * j));
                found[t].add(high, broadcast(x + t * kGroup + 8 * j + 4));
            }
        }
        EACH (t, T) totals[t] = found[t].total(group[t].eights);
    } else {
        Sum8 found[T];
        EACH (j, 8) {
            const Bytes code = load_as<Bytes>(codes + j * 64);
            EACH (t, T) found[t].add(code, broadcast(x + t * kGroup + 4 * j));
        }
        EACH (t, T) totals[t] = found[t].total(group[t].eights);
    }
}

// T rows of inputs from `row` on, side by side; one part of one block of weights.
template <Coding C, bool kGroupScales, bool kOffsets, int T>
INLINE void tile(const Weights& w, const Inputs& x, int64_t row, int64_t block, int part, Floats (&y)[T]) {
    constexpr int64_t kBytes = code_bytes(C);
    const int64_t groups = x.n_groups, lane = part * kLanes;
    const uint8_t* codes = w.codes + block * groups * kBytes + lane * 4;
    const int64_t first = block * groups * kBlock + lane;
    const int8_t* inputs = x.codes + x.place(row) * kGroup;
    const InputGroup* input_groups = x.groups + x.place(row);
    const Floats offset_scale = kOffsets ? load(w.offset_scales + block * kBlock + lane) : Floats{};
    Floats acc[T];
    EACH (t, T) acc[t] = Floats{};
    for (int64_t g = 0; g < groups; ++g) {
        if (T == 1 && part == 0)
            for (int64_t line = 0; line < kBytes; line += 64) __builtin_prefetch(codes + kFetchAhead + line);
        Ints totals[T];
        group_sums<C, T>(codes, inputs, input_groups, totals);
        const Floats scale = kGroupScales ? from_bfloat16(w.group_scales + first + g * kBlock) : Floats{};
        const Floats offset = kOffsets ? from_bytes(w.offsets + first + g * kBlock) * offset_scale : Floats{};
        EACH (t, T) {
            const Floats total = to_floats(totals[t]);
            acc[t] = fma(kGroupScales ? total * scale : total, splat(input_groups[t].scale), acc[t]);
            if (kOffsets) acc[t] = fma(offset, splat(input_groups[t].sum), acc[t]);
        }
        codes += kBytes, inputs += x.side * kGroup, input_groups += x.side;
    }
    EACH (t, T) y[t] = acc[t];
}

template <int T>
INLINE void float_tile(const Weights& w, const Inputs& x, int64_t row, int64_t block, int part,
                       Floats (&y)[T]) {
    const float* weights = w.floats + block * w.columns * kBlock + part * kLanes;
    const float* inputs = x.floats + row * x.stride;
    Floats acc[T];
    EACH (t, T) acc[t] = Floats{};
    for (int64_t c = 0; c < w.columns; ++c) {
        const Floats column = load(weights + c * kBlock);
        EACH (t, T) acc[t] = fma(column, splat(inputs[t * x.stride + c]), acc[t]);
    }
    EACH (t, T) y[t] = acc[t];
}

// Writes part `part` of a row's outputs of one block of weights.
template <Coding C, bool kGroupScales>
INLINE void finish_row(const Weights& w, int64_t block, int part, Floats y, float* row, bool add) {
    const int64_t first = block * kBlock + part * kLanes;
    if (!kGroupScales && C != Coding::kFloat) y = y * load(w.row_scales + first);
    if (w.bias != nullptr) y = y + load(w.bias + first);
    put(row + first, y, w.rows - first, add);
}

template <Coding C, bool kGroupScales, bool kOffsets, int T>
void block_rows(const Weights& w, const Inputs& x, int64_t row, int64_t block, float* out, int64_t stride,
                bool add) {
    for (int part = 0; part < kParts; ++part) {
        Floats y[T];
        if constexpr (C == Coding::kFloat)
            float_tile<T>(w, x, row, block, part, y);
        else
            tile<C, kGroupScales, kOffsets, T>(w, x, row, block, part, y);
        EACH (t, T) finish_row<C, kGroupScales>(w, block, part, y[t], out + (row + t) * stride, add);
    }
}

template <Coding C, bool kGroupScales, bool kOffsets>
void vector_product(const Weights& w, const Inputs& x, Range rows, Range blocks, float* out, int64_t stride,
                    bool add) {
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
        for (int64_t row = rows.begin; row < rows.end;) {
            const int64_t beside = x.side - row % x.side;
            const int64_t left = rows.end - row < beside ? rows.end - row : beside;
            if (left >= kRowsAtOnce) {
                block_rows<C, kGroupScales, kOffsets, kRowsAtOnce>(w, x, row, block, out, stride, add);
                row += kRowsAtOnce;
            } else if (left >= 2) {
                block_rows<C, kGroupScales, kOffsets, 2>(w, x, row, block, out, stride, add);
                row += 2;
            } else {
                block_rows<C, kGroupScales, kOffsets, 1>(w, x, row, block, out, stride, add);
                row += 1;
            }
        }
    }
}

#if defined(__AMX_INT8__)
#include "tiles.h"
#endif

template <Coding C, bool kGroupScales, bool kOffsets>
void product_of(const Weights& w, const Inputs& x, Range rows, Range blocks, float* out, int64_t stride,
                bool add) {
#if defined(__AMX_INT8__)
    if constexpr (C != Coding::kFloat) {
        const Range fours{(rows.begin + 3) / 4 * 4, rows.end / 4 * 4};
        if (x.side == kSide && fours.end - fours.begin >= kFewestRows) {
            vector_product<C, kGroupScales, kOffsets>(w, x, {rows.begin, fours.begin}, blocks, out, stride,
                                                      add);
            product_by_tiles<C, kGroupScales, kOffsets>(w, x, fours, blocks, out, stride, add);
            rows.begin = fours.end;
        }
    }
#endif
    vector_product<C, kGroupScales, kOffsets>(w, x, rows, blocks, out, stride, add);
}

void product(const Weights& w, const Inputs& x, Range rows, Range blocks, float* out, int64_t stride,
             bool add) {
    const bool offsets = w.offsets != nullptr, groups = w.group_scales != nullptr;
    switch (w.coding) {
        case Coding::kFloat:
            return product_of<Coding::kFloat, false, false>(w, x, rows, blocks, out, stride, add);
        case Coding::kEight:
            return product_of<Coding::kEight, false, false>(w, x, rows, blocks, out, stride, add);
        case Coding::kFour:
            if (groups && offsets)
                return product_of<Coding::kFour, true, true>(w, x, rows, blocks, out, stride, add);
            if (groups) return product_of<Coding::kFour, true, false>(w, x, rows, blocks, out, stride, add);
            return product_of<Coding::kFour, false, false>(w, x, rows, blocks, out, stride, add);
    }
}

template <bool kCodes>
void back_of(const Back& b, const float* t, int64_t t_stride, Range rows, Range blocks, float* out,
             int64_t stride) {
    for (int64_t block = blocks.begin; block < blocks.end; ++block)
        for (int64_t row = rows.begin; row < rows.end; ++row)
            for (int part = 0; part < kParts; ++part) {
                const int64_t first = block * b.rank * kBlock + part * kLanes,
                              at = block * kBlock + part * kLanes;
                const float* narrow = t + row * t_stride;
                Floats acc{};
                for (int64_t j = 0; j < b.rank; ++j) {
                    const int64_t place = first + j * kBlock;
                    acc = fma(kCodes ? from_bytes(b.codes + place) : load(b.floats + place), splat(narrow[j]),
                              acc);
                }
                if (kCodes) acc = acc * load(b.scales + at);
                put(out + row * stride + at, acc, b.rows - at, true);
            }
}

void back(const Back& b, const float* t, int64_t t_stride, Range rows, Range blocks, float* out,
          int64_t stride) {
    (b.codes != nullptr ? back_of<true> : back_of<false>)(b, t, t_stride, rows, blocks, out, stride);
}

// --- Between products

// The kLanes floats at i of `count`, zeros beyond.
INLINE Floats load_part(const float* from, int64_t count) {
    if (count >= kLanes) return load(from);
    Floats x{};
    for (int64_t i = 0; i < count; ++i) x[i] = from[i];
    return x;
}
INLINE void store_part(float* to, Floats x, int64_t count) { put(to, x, count, false); }

void rms_norm(const float* x, const float* weight, float eps, int64_t count, float* y) {
    Floats squares{};
    for (int64_t i = 0; i < count; i += kLanes) {
        const Floats part = load_part(x + i, count - i);
        squares = fma(part, part, squares);
    }
    const Floats factor = splat(1.0f / __builtin_sqrtf(sum(squares) / (float)count + eps));
    for (int64_t i = 0; i < count; i += kLanes)
        store_part(y + i, load_part(x + i, count - i) * factor * load_part(weight + i, count - i), count - i);
}

void rotate(float* x, const float* cos, const float* sin, int64_t head_dim) {
    const int64_t half = head_dim / 2;
    for (int64_t i = 0; i < half; i += kLanes) {
        const int64_t rest = half - i;
        const Floats low = load_part(x + i, rest), high = load_part(x + half + i, rest);
        const Floats c = load_part(cos + i, rest), s = load_part(sin + i, rest);
        store_part(x + i, low * c - high * s, rest);
        store_part(x + half + i, high * c + low * s, rest);
    }
}

void gate(const float* gates, const float* up, int64_t count, float* y) {
    for (int64_t i = 0; i < count; i += kLanes) {
        const Floats x = load_part(gates + i, count - i);
        const Floats power =
            larger(x * splat(1.44269504f), splat(-126.0f));  // below, the sigmoid is 1e-38 or less
        const Floats sigmoid = splat(1.0f) / (splat(1.0f) + exp2(-power));
        store_part(y + i, x * sigmoid * load_part(up + i, count - i), count - i);
    }
}

// --- Attention

template <bool kHalf>
INLINE Floats load_kv(const void* base, int64_t at) {
    return kHalf ? from_half((const uint16_t*)base + at) : load((const float*)base + at);
}

INLINE void put_kv(bool half, void* base, int64_t at, const float* x, int64_t count) {
    if (!half) {
        __builtin_memcpy((float*)base + at, x, (size_t)count * 4);
        return;
    }
    uint16_t halves[kLanes];
    for (int64_t i = 0; i < count; i += kLanes) {
        to_half(halves, load_part(x + i, count - i));
        const int64_t rest = count - i < kLanes ? count - i : kLanes;
        __builtin_memcpy((uint16_t*)base + at + i, halves, (size_t)rest * 2);
    }
}

void keep(const Heads& h, const float* key, const float* value, int64_t position, void* keys, void* values) {
    const int64_t part = position / kPart, lane = position % kPart;
    for (int64_t d = 0; d < h.head_dim; ++d)
        put_kv(h.half, keys, (part * h.head_dim + d) * kPart + lane, key + d, 1);
    put_kv(h.half, values, position * h.head_dim, value, h.head_dim);
}

// G queries that read the same keys and values.
template <bool kHalf, int G>
void attend_some(const Heads& h, const float* q, const void* keys, const void* values, int64_t count,
                 float* state) {
    const int64_t dim = h.head_dim, state_floats = 2 + dim;
    float scores[G][kPositions];
    Floats most[G];
    EACH (g, G) most[g] = splat(-3.0e38f);
    const Floats scale = splat(h.scale);
    for (int64_t first = 0; first < count; first += kLanes) {
        const int64_t base = first / kPart * kPart * dim + first % kPart;
        Floats even[G], odd[G];
        EACH (g, G) even[g] = odd[g] = Floats{};
        for (int64_t d = 0; d < dim; d += 2) {
            const Floats k0 = load_kv<kHalf>(keys, base + d * kPart);
            const Floats k1 = load_kv<kHalf>(keys, base + (d + 1) * kPart);
            EACH (g, G) {
                even[g] = fma(k0, splat(q[g * dim + d]), even[g]);
                odd[g] = fma(k1, splat(q[g * dim + d + 1]), odd[g]);
            }
        }
        EACH (g, G) {
            Floats score = (even[g] + odd[g]) * scale;
            for (int64_t i = count - first; i < kLanes; ++i) score[i] = -3.0e38f;
            most[g] = larger(most[g], score);
            store(&scores[g][first], score);
        }
    }
    EACH (g, G) {
        const float top = largest(most[g]);
        Floats sums{};
        for (int64_t first = 0; first < count; first += kLanes) {
            Floats weight = exp2((load(&scores[g][first]) - splat(top)) * splat(1.44269504f));
            for (int64_t i = count - first; i < kLanes; ++i) weight[i] = 0.0f;
            sums += weight;
            store(&scores[g][first], weight);
        }
        state[g * state_floats] = top;
        state[g * state_floats + 1] = sum(sums);
    }
    constexpr int kStrip = G > 2 ? 4 : 8;  // vectors of head_dim at once
    for (int64_t d = 0; d < dim; d += kStrip * kLanes) {
        const int64_t rest = dim - d;
        Floats acc[G][kStrip];
        EACH (g, G)
            EACH (i, kStrip) acc[g][i] = Floats{};
        if (rest >= kStrip * kLanes) {
            for (int64_t p = 0; p < count; ++p) {
                Floats v[kStrip];
                EACH (i, kStrip) v[i] = load_kv<kHalf>(values, p * dim + d + i * kLanes);
                EACH (g, G)
                    EACH (i, kStrip) acc[g][i] = fma(splat(scores[g][p]), v[i], acc[g][i]);
            }
            EACH (g, G)
                EACH (i, kStrip) store(state + g * state_floats + 2 + d + i * kLanes, acc[g][i]);
            continue;
        }
        for (int64_t e = d; e < dim; e += kLanes) {  // the last vectors; KV memory ends with some to spare
            EACH (g, G) acc[g][0] = Floats{};
            for (int64_t p = 0; p < count; ++p) {
                const Floats v = load_kv<kHalf>(values, p * dim + e);
                EACH (g, G) acc[g][0] = fma(splat(scores[g][p]), v, acc[g][0]);
            }
            EACH (g, G) store_part(state + g * state_floats + 2 + e, acc[g][0], dim - e);
        }
    }
}

template <bool kHalf>
void attend_of(const Heads& h, const float* q, const void* keys, const void* values, int64_t count,
               float* state) {
    const int64_t dim = h.head_dim, state_floats = 2 + dim;
    int64_t g = 0;
    for (; g + 4 <= h.group; g += 4)
        attend_some<kHalf, 4>(h, q + g * dim, keys, values, count, state + g * state_floats);
    switch (h.group - g) {
        case 3:
            return attend_some<kHalf, 3>(h, q + g * dim, keys, values, count, state + g * state_floats);
        case 2:
            return attend_some<kHalf, 2>(h, q + g * dim, keys, values, count, state + g * state_floats);
        case 1:
            return attend_some<kHalf, 1>(h, q + g * dim, keys, values, count, state + g * state_floats);
    }
}

void attend(const Heads& h, const float* q, const void* keys, const void* values, int64_t count,
            float* state) {
    (h.half ? attend_of<true> : attend_of<false>)(h, q, keys, values, count, state);
}

void join(const Heads& h, const float* next, float* state) {
    const int64_t state_floats = 2 + h.head_dim;
    for (int64_t g = 0; g < h.group; ++g, next += state_floats, state += state_floats) {
        const float top = next[0] > state[0] ? next[0] : state[0];
        const Floats before = exp2(splat((state[0] - top) * 1.44269504f));
        const Floats after = exp2(splat((next[0] - top) * 1.44269504f));
        state[0] = top;
        state[1] = state[1] * before[0] + next[1] * after[0];
        for (int64_t d = 2; d < state_floats; d += kLanes) {
            const int64_t rest = state_floats - d;
            const Floats sum = fma(load_part(next + d, rest), after, load_part(state + d, rest) * before);
            store_part(state + d, sum, rest);
        }
    }
}

void finish(const Heads& h, const float* state, float* out) {
    for (int64_t g = 0; g < h.group; ++g, state += 2 + h.head_dim, out += h.head_dim) {
        const Floats inverse = splat(1.0f / state[1]);
        for (int64_t d = 0; d < h.head_dim; d += kLanes)
            store_part(out + d, load_part(state + 2 + d, h.head_dim - d) * inverse, h.head_dim - d);
    }
}

}  // namespace

#define NAME_OF(isa) #isa
#define NAME(isa) NAME_OF(isa)
extern const Kernels kernels;
const Kernels kernels{
    NAME(BEDPLATE_ISA), quantize, product, back, rms_norm, rotate, gate, keep, attend, join, finish};

}  // namespace bedplate::BEDPLATE_ISA
