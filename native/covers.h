// Kernels of packing: codes for groups of weights. Included by kernels.cpp, in its namespace.
//
// Each lane computes a group of its own, value by value, and nothing is fused. So all instruction sets give
// the same bits: a foundation is named by its bytes.

// The nearest bfloat16 of what is positive, ties to even.
INLINE Floats as_bfloat16(Floats x) {
    const Ints bits = (Ints)x;
    return (Floats)((bits + 0x7fff + ((bits >> 16) & 1)) & ~0xffff);
}

// Codes that cover a range from end to end. start: what code 0 stands for as they are chosen; shift: how much
// more it stands for with the least error.
struct Cover {
    Floats start, scale, inverse, shift;
};

INLINE Cover cover(Floats middle, Floats half) {
    const Floats least = splat(1.17549435e-38f * 16);  // its inverse is finite
    const Floats scale = as_bfloat16(larger(half / splat(7.5f), least));
    // Code -8 lies at the lower end, code 7 at the upper.
    return {middle + scale * splat(0.5f), scale, splat(1.0f) / scale, Floats{}};
}

INLINE Floats code_of(Floats distance, const Cover& c) {
    return rounded(smaller(larger(distance * c.inverse, splat(-8.0f)), splat(7.0f)));
}

// What the code of a value leaves of it.
INLINE Floats left_by(const Cover& c, Floats x) {
    const Floats distance = x - c.start;
    return distance - code_of(distance, c) * c.scale;
}

// Shares of a group's range that its codes may cover: cutting the ends off makes the steps between finer.
constexpr int kShares = 5;
constexpr float kShareOf[kShares] = {1.0f, 0.94f, 0.88f, 0.82f, 0.76f};

// Adds up for each cover what `measure` makes of what its codes leave of the values, weighted.
template <class Measure>
INLINE void add_up(const Groups& g, const float* values, const Cover* covers, Measure measure, Floats* sums) {
    EACH (s, kShares) sums[s] = Floats{};
    for (int64_t i = 0; i < g.count; ++i) {
        const Floats x = load(values + i * kBlock), weight = splat(g.importance[i]);
        EACH (s, kShares) sums[s] += measure(left_by(covers[s], x), covers[s]) * weight;
    }
}

INLINE void best_covers(const Groups& g, const float* values, int8_t* codes, float* scales, float* offsets) {
    Floats low = load(values), high = low;
    float total = 0.0f;
    for (int64_t i = 0; i < g.count; ++i) {
        const Floats x = load(values + i * kBlock);
        low = smaller(x, low);
        high = larger(x, high);
        total += g.importance[i];
    }
    // Halves first: the whole range may be beyond float32.
    low *= splat(0.5f), high *= splat(0.5f);
    Cover covers[kShares];
    EACH (s, kShares) covers[s] = cover(high + low, (high - low) * splat(kShareOf[s]));
    Floats left[kShares], errors[kShares];
    add_up(g, values, covers, [](Floats x, const Cover&) { return x; }, left);
    EACH (s, kShares) covers[s].shift = left[s] / splat(total);
    const auto squared = [](Floats x, const Cover& c) { return (x - c.shift) * (x - c.shift); };
    add_up(g, values, covers, squared, errors);
    Cover best = covers[0];
    Floats least = errors[0];
    EACH (s, kShares) {
        const Ints better = errors[s] < least;
        least = better ? errors[s] : least;
        best.start = better ? covers[s].start : best.start;
        best.scale = better ? covers[s].scale : best.scale;
        best.inverse = better ? covers[s].inverse : best.inverse;
        best.shift = better ? covers[s].shift : best.shift;
    }
    for (int64_t i = 0; i < g.count; ++i)
        to_bytes(codes + i * kBlock, code_of(load(values + i * kBlock) - best.start, best));
    store(scales, best.scale);
    store(offsets, best.start + best.shift);
}

void cover_groups(const Groups& g, int8_t* codes, float* scales, float* offsets) {
    for (int at = 0; at < kBlock; at += kLanes)
        best_covers(g, g.values + at, codes + at, scales + at, offsets + at);
}

// In doubles: what a row's square comes to is a norm of DoRA's.
double square(const float* x, int64_t count) {
    double sums[16] = {}, sum = 0.0;
    const int64_t whole = count / 16 * 16;
    for (int64_t at = 0; at < whole; at += 16)
        EACH (i, 16) sums[i] += (double)x[at + i] * (double)x[at + i];
    EACH (i, 16) sum += sums[i];
    for (int64_t at = whole; at < count; ++at) sum += (double)x[at] * (double)x[at];
    return sum;
}
