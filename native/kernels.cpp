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
constexpr int64_t kNear = 1024, kFar = 4096;  // bytes between asking for weights and their use
constexpr int64_t kSum = 64;  // products that are summed as one: in a single sum the error grows with columns

// --- Inputs in groups

// Of each 8 columns first the even ones, then the odd.
INLINE void apart(const int8_t* from, int8_t* to) {
    typedef int8_t Sixteen __attribute__((vector_size(16)));
    const Sixteen x = load_as<Sixteen>(from);
#if defined(__clang__)
    const Sixteen y = __builtin_shufflevector(x, x, 0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
#else
    const Sixteen y = __builtin_shuffle(x, Sixteen{0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15});
#endif
    __builtin_memcpy(to, &y, sizeof y);
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
        to_bytes(in_order + i * kLanes, code);
    }
    const float total = sum(sums);
    // A number that is none has no code: it must not pass for a zero.
    const bool known = total == total;
    *group = {known ? scale : total, scale * total, known ? -8 * (int32_t)total : 0};
    EACH (i, kGroup / 16) apart(in_order + 16 * i, codes + 16 * i);
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
        EACH (t, T) totals[t] = Sum4::begin(group[t].start);
        EACH (j, 4) {
            const Bytes both = load_as<Bytes>(codes + j * 64);
            const Bytes low = both & (int8_t)15;
            const Bytes high = (Bytes)((Shorts)both >> 4) & (int8_t)15;
            EACH (t, T) {
                totals[t] = Sum4::add(totals[t], low, broadcast(x + t * kGroup + 8 * j));
                totals[t] = Sum4::add(totals[t], high, broadcast(x + t * kGroup + 8 * j + 4));
            }
        }
        EACH (t, T) totals[t] = Sum4::total(totals[t], group[t].start);
    } else {
        EACH (t, T) totals[t] = Sum8::begin(group[t].start);
        EACH (j, 8) {
            const Bytes code = load_as<Bytes>(codes + j * 64);
            EACH (t, T) totals[t] = Sum8::add(totals[t], code, broadcast(x + t * kGroup + 4 * j));
        }
        EACH (t, T) totals[t] = Sum8::total(totals[t], group[t].start);
    }
}

// Asks for what follows the bytes at `from`: what comes soon for the first cache, what comes later for the
// second.
INLINE void fetch(const void* from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) {
        __builtin_prefetch((const char*)from + kNear + i);
        __builtin_prefetch((const char*)from + kFar + i, 0, 2);
    }
}

// T rows of inputs from `row` on, side by side; P parts of one block of weights, from `part` on.
template <Coding C, bool kGroupScales, bool kOffsets, int T, int P>
INLINE void tile(const Weights& w, const Inputs& x, int64_t row, int64_t block, int part, Floats (&y)[P][T]) {
    const int64_t groups = x.n_groups, lane = part * kLanes;
    const uint8_t* codes = w.codes + block * groups * code_bytes(C) + lane * 4;
    const int64_t first = block * groups * kBlock + lane;
    const int8_t* inputs = x.codes + x.place(row) * kGroup;
    const InputGroup* input_groups = x.groups + x.place(row);
    EACH (p, P)
        EACH (t, T) y[p][t] = Floats{};
    for (int64_t g = 0; g < groups; ++g) {
        if (part == 0) fetch(codes, code_bytes(C));
        EACH (p, P) {
            const int64_t at = first + g * kBlock + p * kLanes;
            Ints totals[T];
            group_sums<C, T>(codes + p * kLanes * 4, inputs, input_groups, totals);
            const Floats scale = kGroupScales ? from_bfloat16(w.group_scales + at) : Floats{};
            const Floats offset = kOffsets ? from_bytes(w.offsets + at) *
                                                 load(w.offset_scales + block * kBlock + lane + p * kLanes)
                                           : Floats{};
            EACH (t, T) {
                const Floats total = to_floats(totals[t]);
                y[p][t] = fma(kGroupScales ? total * scale : total, splat(input_groups[t].scale), y[p][t]);
                if (kOffsets) y[p][t] = fma(offset, splat(input_groups[t].sum), y[p][t]);
            }
        }
        codes += code_bytes(C), inputs += x.side * kGroup, input_groups += x.side;
    }
}

template <int T>
INLINE void float_tile(const Weights& w, const Inputs& x, int64_t row, int64_t block, int part,
                       Floats (&y)[T]) {
    const float* weights = w.floats + block * w.columns * kBlock + part * kLanes;
    const float* inputs = x.floats + row * x.stride;
    Floats acc[T];
    const auto add = [&](int64_t c) __attribute__((always_inline)) {
        const Floats column = load(weights + c * kBlock);
        EACH (t, T) acc[t] = fma(column, splat(inputs[t * x.stride + c]), acc[t]);
    };
    EACH (t, T) y[t] = Floats{};
    for (int64_t c = 0; c < w.columns;) {
        const int64_t end = c + kSum < w.columns ? c + kSum : w.columns;
        EACH (t, T) acc[t] = Floats{};
        for (; c + 4 <= end; c += 4)  // a CPU guesses the end of so few turns
            EACH (j, 4) add(c + j);
        for (; c < end; ++c) add(c);
        EACH (t, T) y[t] += acc[t];
    }
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
    constexpr int P = T == 1 && C != Coding::kFloat ? kParts : 1;  // for one row, weights are read once
    for (int part = 0; part < kParts; part += P) {
        Floats y[P][T];
        if constexpr (C == Coding::kFloat)
            float_tile<T>(w, x, row, block, part, y[0]);
        else
            tile<C, kGroupScales, kOffsets, T, P>(w, x, row, block, part, y);
        EACH (p, P)
            EACH (t, T)
                finish_row<C, kGroupScales>(w, block, part + p, y[p][t], out + (row + t) * stride, add);
    }
}

template <Coding C, bool kGroupScales, bool kOffsets>
void vector_product(const Weights& w, const Inputs& x, Range rows, Range blocks, float* out, int64_t stride,
                    bool add) {
    for (int64_t block = blocks.begin; block < blocks.end; ++block)
        for (int64_t row = rows.begin; row < rows.end;) {
            const auto take = [&](auto of_rows, int64_t count) {
                of_rows(w, x, row, block, out, stride, add);
                row += count;
            };
            const int64_t beside = x.side - row % x.side;
            const int64_t left = rows.end - row < beside ? rows.end - row : beside;
            if (left >= kRowsAtOnce)
                take(block_rows<C, kGroupScales, kOffsets, kRowsAtOnce>, kRowsAtOnce);
            else if (left >= 4)
                take(block_rows<C, kGroupScales, kOffsets, 4>, 4);
            else if (left >= 2)
                take(block_rows<C, kGroupScales, kOffsets, 2>, 2);
            else
                take(block_rows<C, kGroupScales, kOffsets, 1>, 1);
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
    const auto of = [&](auto product_of_kind) { product_of_kind(w, x, rows, blocks, out, stride, add); };
    switch (w.coding) {
        case Coding::kFloat:
            return of(product_of<Coding::kFloat, false, false>);
        case Coding::kEight:
            return of(product_of<Coding::kEight, false, false>);
        case Coding::kFour:
            if (groups && offsets) return of(product_of<Coding::kFour, true, true>);
            if (groups) return of(product_of<Coding::kFour, true, false>);
            return of(product_of<Coding::kFour, false, false>);
    }
}

// T rows of narrow values from `row` on; V vectors of outputs from number `vector` on.
template <bool kCodes, int T, int V>
INLINE void back_tile(const Back& b, const float* t, int64_t t_stride, int64_t row, int64_t vector,
                      float* out, int64_t stride) {
    int64_t first[V];
    Floats acc[V][T];
    const int64_t bytes = V * b.rank * kLanes * (kCodes ? 1 : 4);
    fetch((kCodes ? (const char*)b.codes : (const char*)b.floats) + vector * bytes / V, bytes);
    EACH (v, V) {
        first[v] = (vector + v) / kParts * b.rank * kBlock + (vector + v) % kParts * kLanes;
        EACH (i, T) acc[v][i] = Floats{};
    }
    const float* narrow = t + row * t_stride;
    for (int64_t j = 0; j < b.rank; ++j)
        EACH (v, V) {
            const int64_t at = first[v] + j * kBlock;
            const Floats weight = kCodes ? from_bytes(b.codes + at) : load(b.floats + at);
            EACH (i, T) acc[v][i] = fma(weight, splat(narrow[i * t_stride + j]), acc[v][i]);
        }
    EACH (v, V) {
        const int64_t at = (vector + v) * kLanes;
        EACH (i, T)
            put(out + (row + i) * stride + at, kCodes ? acc[v][i] * load(b.scales + at) : acc[v][i],
                b.rows - at, true);
    }
}

template <bool kCodes>
void back_of(const Back& b, const float* t, int64_t t_stride, Range rows, Range blocks, float* out,
             int64_t stride) {
    const int64_t end = blocks.end * kParts;
    int64_t row = rows.begin;
    for (; row + 4 <= rows.end; row += 4)
        for (int64_t v = blocks.begin * kParts; v < end; ++v)
            back_tile<kCodes, 4, 1>(b, t, t_stride, row, v, out, stride);
    for (; row < rows.end; ++row) {
        int64_t v = blocks.begin * kParts;
        for (; v + 4 <= end; v += 4) back_tile<kCodes, 1, 4>(b, t, t_stride, row, v, out, stride);
        for (; v < end; ++v) back_tile<kCodes, 1, 1>(b, t, t_stride, row, v, out, stride);
    }
}

void back(const Back& b, const float* t, int64_t t_stride, Range rows, Range blocks, float* out,
          int64_t stride) {
    (b.codes != nullptr ? back_of<true> : back_of<false>)(b, t, t_stride, rows, blocks, out, stride);
}

// --- Between products

INLINE int32_t lane_of(int64_t i) { return (int32_t)(i < 0 ? 0 : i < kLanes ? i : kLanes); }
// Of lanes, those from `begin` on and before `end`; -1 or 0.
INLINE Ints among(int64_t begin, int64_t end) {
    Ints lane;
    EACH (i, kLanes) lane[i] = i;
    return (lane >= lane_of(begin)) & (lane < lane_of(end));
}

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

void layer_norm(const float* x, const float* weight, const float* bias, float eps, int64_t count, float* y) {
    Floats total{}, squares{};
    for (int64_t i = 0; i < count; i += kLanes) total += load_part(x + i, count - i);
    const Floats mean = splat(sum(total) / (float)count);
    for (int64_t i = 0; i < count; i += kLanes) {
        const Floats part = among(0, count - i) ? load_part(x + i, count - i) - mean : Floats{};
        squares = fma(part, part, squares);
    }
    const Floats factor = splat(1.0f / __builtin_sqrtf(sum(squares) / (float)count + eps));
    for (int64_t i = 0; i < count; i += kLanes) {
        const int64_t rest = count - i;
        const Floats part = (load_part(x + i, rest) - mean) * factor * load_part(weight + i, rest);
        store_part(y + i, bias == nullptr ? part : part + load_part(bias + i, rest), rest);
    }
}

// e^x of |x| below 87: beyond, as at 87.
INLINE Floats exponential(Floats x) {
    const Floats most = splat(87.0f), capped = x > most ? most : larger(x, -most);
    return exp2(capped * splat(1.44269504f));
}
INLINE Floats sigmoid(Floats x) { return splat(1.0f) / (splat(1.0f) + exponential(-x)); }
// cap · tanh(x / cap), by e^y - 1 with y = 2 |x| / cap: from e^y, a small x would lose its last places.
INLINE Floats capped(Floats x, float cap) {
    const Floats power = absolute(x) * splat(2.88539008f / cap), most = splat(126.0f);
    const Floats more = exp2_less_one(power > most ? most : power);
    const Floats y = splat(cap) * (more / (more + splat(2.0f)));
    return x < Floats{} ? -y : y;
}

template <Activation A>
INLINE Floats activated(Floats x) {
    if (A == Activation::kSilu) return x * sigmoid(x);
    if (A == Activation::kRelu2) return larger(x, Floats{}) * larger(x, Floats{});
    // x / 2 · (1 + tanh(z)) = x · sigmoid(2z), z = sqrt(2 / π) · (x + 0.044715 x³)
    return x * sigmoid(splat(1.59576912f) * fma(x * x * x, splat(0.044715f), x));
}

template <Activation A>
void activate_by(const float* up, int64_t count, float* x) {
    for (int64_t i = 0; i < count; i += kLanes) {
        const Floats y = activated<A>(load_part(x + i, count - i));
        store_part(x + i, up == nullptr ? y : y * load_part(up + i, count - i), count - i);
    }
}

void activate(Activation activation, const float* up, int64_t count, float* x) {
    switch (activation) {
        case Activation::kSilu:
            return activate_by<Activation::kSilu>(up, count, x);
        case Activation::kGelu:
            return activate_by<Activation::kGelu>(up, count, x);
        case Activation::kRelu2:
            return activate_by<Activation::kRelu2>(up, count, x);
    }
}

void add(const float* y, float scale, int64_t count, float* x) {
    for (int64_t i = 0; i < count; i += kLanes)
        store_part(x + i, fma(load_part(y + i, count - i), splat(scale), load_part(x + i, count - i)),
                   count - i);
}

void scale(float factor, float cap, int64_t count, float* x) {
    for (int64_t i = 0; i < count; i += kLanes) {
        const Floats y = load_part(x + i, count - i) * splat(factor);
        store_part(x + i, cap == 0.0f ? y : capped(y, cap), count - i);
    }
}

void affine(const float* factor, const float* shift, const float* onto, int64_t count, float* x) {
    for (int64_t i = 0; i < count; i += kLanes) {
        const int64_t rest = count - i;
        const Floats y = fma(load_part(factor + i, rest), load_part(x + i, rest), load_part(shift + i, rest));
        store_part(x + i, onto == nullptr ? y : load_part(onto + i, rest) + y, rest);
    }
}

// --- Attention

template <bool kHalf>
INLINE Floats load_kv(const void* base, int64_t at) {
    return kHalf ? from_half((const uint16_t*)base + at) : load((const float*)base + at);
}

// Writes x[0] … x[count - 1] to places from `at` on, `step` apart.
INLINE void put_kv(bool half, void* base, int64_t at, int64_t step, const float* x, int64_t count) {
    if (!half) {
        for (int64_t i = 0; i < count; ++i) ((float*)base)[at + i * step] = x[i];
        return;
    }
    uint16_t halves[kLanes];
    for (int64_t i = 0; i < count; i += kLanes) {
        to_half(halves, load_part(x + i, count - i));
        const int64_t rest = count - i < kLanes ? count - i : kLanes;
        for (int64_t j = 0; j < rest; ++j) ((uint16_t*)base)[at + (i + j) * step] = halves[j];
    }
}

void keep(const Heads& h, const float* key, const float* value, int64_t position, void* keys, void* values) {
    const int64_t part = position / kPart, lane = position % kPart;
    put_kv(h.half, keys, part * h.head_dim * kPart + lane, kPart, key, h.head_dim);
    put_kv(h.half, values, position * h.head_dim, 1, value, h.head_dim);
}

// Asks for what stands as far from `base` as item `at` of keys or values does from theirs.
template <bool kHalf>
INLINE void fetch_kv(const void* base, int64_t at, int64_t count) {
    constexpr int64_t kItem = kHalf ? 2 : 4;
    for (int64_t i = 0; i < count * kItem; i += 64) __builtin_prefetch((const char*)base + at * kItem + i);
}

// G queries that read the same keys and values. Values are fetched while keys are read, and `then` while
// values are.
template <bool kHalf, int G>
void attend_some(const Heads& h, const float* q, const void* keys, const void* values, Range positions,
                 float* state, const void* then) {
    const int64_t dim = h.head_dim, state_floats = 2 + dim, count = positions.end;
    const int64_t begin = positions.begin / kLanes * kLanes;
    float scores[G][kPositions];
    Floats most[G];
    EACH (g, G) most[g] = splat(-3.0e38f);
    const Floats scale = splat(h.scale);
    for (int64_t first = begin; first < count; first += kLanes) {
        const int64_t base = first / kPart * kPart * dim + first % kPart;
        Floats even[G], odd[G];
        EACH (g, G) even[g] = odd[g] = Floats{};
        for (int64_t d = 0; d < dim; d += 2) {
            const Floats k0 = load_kv<kHalf>(keys, base + d * kPart);
            const Floats k1 = load_kv<kHalf>(keys, base + (d + 1) * kPart);
            if (first % kPart == 0) fetch_kv<kHalf>(values, base + d * kPart, 2 * kPart);
            EACH (g, G) {
                even[g] = fma(k0, splat(q[g * dim + d]), even[g]);
                odd[g] = fma(k1, splat(q[g * dim + d + 1]), odd[g]);
            }
        }
        EACH (g, G) {
            Floats score = (even[g] + odd[g]) * scale;
            if (h.cap != 0.0f) score = capped(score, h.cap);
            score = among(positions.begin - first, count - first) ? score : splat(-3.0e38f);
            most[g] = larger(most[g], score);
            store(&scores[g][first], score);
        }
    }
    EACH (g, G) {
        const float top = largest(most[g]);
        Floats sums{};
        for (int64_t first = begin; first < count; first += kLanes) {
            const Floats power = (load(&scores[g][first]) - splat(top)) * splat(1.44269504f);
            const Floats weight = among(positions.begin - first, count - first) ? exp2(power) : Floats{};
            sums += weight;
            store(&scores[g][first], weight);
        }
        state[g * state_floats] = top;
        state[g * state_floats + 1] = sum(sums);
    }
    // Vectors of head_dim at once: their sums and a weight for each query fit into the registers.
    constexpr int kStrip = kRegisters == 32 ? (G > 2 || kLanes == 16 ? 4 : 8) : G == 1 ? 8 : G == 4 ? 2 : 4;
    for (int64_t d = 0; d < dim; d += kStrip * kLanes) {
        const int64_t rest = dim - d;
        Floats acc[G][kStrip];
        EACH (g, G)
            EACH (i, kStrip) acc[g][i] = Floats{};
        if (rest >= kStrip * kLanes) {
            for (int64_t p = positions.begin; p < count; ++p) {
                fetch_kv<kHalf>(then, p * dim + d, kStrip * kLanes);
                EACH (i, kStrip) {
                    const Floats v = load_kv<kHalf>(values, p * dim + d + i * kLanes);
                    EACH (g, G) acc[g][i] = fma(splat(scores[g][p]), v, acc[g][i]);
                }
            }
            EACH (g, G)
                EACH (i, kStrip) store(state + g * state_floats + 2 + d + i * kLanes, acc[g][i]);
            continue;
        }
        for (int64_t e = d; e < dim; e += kLanes) {  // the last vectors; KV memory ends with some to spare
            EACH (g, G) acc[g][0] = Floats{};
            for (int64_t p = positions.begin; p < count; ++p) {
                const Floats v = load_kv<kHalf>(values, p * dim + e);
                EACH (g, G) acc[g][0] = fma(splat(scores[g][p]), v, acc[g][0]);
            }
            EACH (g, G) store_part(state + g * state_floats + 2 + e, acc[g][0], dim - e);
        }
    }
}

template <bool kHalf>
void attend_of(const Heads& h, const float* q, const void* keys, const void* values, Range positions,
               float* state, const void* then) {
    for (int64_t g = 0; g < h.group;) {
        const auto take = [&](auto attend_g, int64_t n) {
            attend_g(h, q + g * h.head_dim, keys, values, positions, state + g * (2 + h.head_dim), then);
            g += n;
        };
        const int64_t left = h.group - g;
        if (left >= 4)
            take(attend_some<kHalf, 4>, 4);
        else if (left == 3)
            take(attend_some<kHalf, 3>, 3);
        else if (left == 2)
            take(attend_some<kHalf, 2>, 2);
        else
            take(attend_some<kHalf, 1>, 1);
    }
}

void attend(const Heads& h, const float* q, const void* keys, const void* values, Range positions,
            float* state, const void* then) {
    (h.half ? attend_of<true> : attend_of<false>)(h, q, keys, values, positions, state, then);
}

void join(const Heads& h, const float* states, int64_t count, float* weights, float* out) {
    const int64_t floats = 2 + h.head_dim, step = h.group * floats;
    for (int64_t g = 0; g < h.group; ++g, states += floats, out += h.head_dim) {
        float top = states[0], total = 0.0f;
        for (int64_t i = 0; i < count; ++i) {
            weights[i] = states[i * step];
            top = weights[i] > top ? weights[i] : top;
        }
        for (int64_t i = 0; i < count; i += kLanes) {
            const Floats power = load_part(weights + i, count - i) - splat(top);
            store_part(weights + i, exp2(power * splat(1.44269504f)), count - i);
        }
        for (int64_t i = 0; i < count; ++i) total += weights[i] * states[i * step + 1];
        const Floats inverse = splat(1.0f / total);
        for (int64_t d = 0; d < h.head_dim; d += kLanes) {
            const int64_t rest = h.head_dim - d;
            Floats sum{};
            for (int64_t i = 0; i < count; ++i)
                sum = fma(splat(weights[i]), load_part(states + i * step + 2 + d, rest), sum);
            store_part(out + d, sum * inverse, rest);
        }
    }
}

#include "covers.h"
#include "masses.h"

}  // namespace

#define NAME_OF(isa) #isa
#define NAME(isa) NAME_OF(isa)
extern const Kernels kernels;
const Kernels kernels{NAME(BEDPLATE_ISA),
                      quantize,
                      product,
                      back,
                      rms_norm,
                      layer_norm,
                      rotate,
                      activate,
                      add,
                      scale,
                      affine,
                      keep,
                      attend,
                      join,
                      maxima,
                      masses,
                      weights_of_block,
                      cover_groups,
                      square};

}  // namespace bedplate::BEDPLATE_ISA
