// Kernels of sampling. Included by kernels.cpp, in its namespace.
//
// All instruction sets give the same bits: all round at the same places, and 16 sums are kept and added up in
// one order, however many lanes a vector has.

struct Sixteen {
    Floats parts[16 / kLanes];
};

INLINE Sixteen all_sixteen(float x) {
    Sixteen y;
    EACH (i, 16 / kLanes) y.parts[i] = splat(x);
    return y;
}

template <class Folded>
INLINE float fold(const Sixteen& x, Folded folded) {
    float lanes[16];
    EACH (i, 16 / kLanes) store(lanes + i * kLanes, x.parts[i]);
    Four y = folded(folded(load_as<Four>(lanes), load_as<Four>(lanes + 8)),
                    folded(load_as<Four>(lanes + 4), load_as<Four>(lanes + 12)));
    y = folded(y, Four{y[2], y[3], y[2], y[3]});
    return folded(y, Four{y[1], y[1], y[1], y[1]})[0];
}

// 2^x for x up to 0, and 1 for 0; relative error below 2e-7; 0 below -126.5.
INLINE Floats power_of_two(Floats x) {
    x = larger(x, splat(-127.0f));
    const Floats magic = splat(12582912.0f);
    const Floats shifted = x + magic;  // the nearest integer is in the low bits
    const Floats f = x - (shifted - magic);
    Floats p = splat(1.326472731e-3f);
    p = fused(p, f, splat(9.671512991e-3f));
    p = fused(p, f, splat(5.550733581e-2f));
    p = fused(p, f, splat(2.402224243e-1f));
    p = fused(p, f, splat(6.931470037e-1f));
    p = fused(p, f, splat(1.0f));
    return p * (Floats)((((Ints)shifted - (Ints)magic) + 127) << 23);
}

INLINE Floats weight_of(Floats value, const Candidates& c) {
    return power_of_two((value - splat(c.top)) * splat(c.scale));
}

// A block's values, and -inf beyond the last.
INLINE const float* whole_block(const float* values, int64_t count, int64_t block, float* room) {
    const int64_t at = block * kMassBlock;
    if (at + kMassBlock <= count) return values + at;
    for (int64_t i = 0; i < kMassBlock; ++i) room[i] = at + i < count ? values[at + i] : -__builtin_inff();
    return room;
}

bool maxima(const float* values, int64_t count, float* found) {
    float room[kMassBlock];
    Ints nan{};
    for (int64_t b = 0; b * kMassBlock < count; ++b) {
        const float* block = whole_block(values, count, b, room);
        Sixteen most = all_sixteen(-__builtin_inff());
        for (int64_t at = 0; at < kMassBlock; at += 16)
            EACH (i, 16 / kLanes) {
                const Floats x = load(block + at + i * kLanes);
                most.parts[i] = larger(x, most.parts[i]);
                nan |= x != x;
            }
        found[b] = fold(most, [](Four a, Four b) { return a > b ? a : b; });
    }
    int32_t any = 0;
    EACH (i, kLanes) any |= nan[i];
    return any == 0;
}

template <bool kAll>
INLINE float mass_of(const float* block, const Candidates& c, float least) {
    Sixteen sum = all_sixteen(0.0f);
    for (int64_t at = 0; at < kMassBlock; at += 16)
        EACH (i, 16 / kLanes) {
            const Floats x = load(block + at + i * kLanes), weight = weight_of(x, c);
            if constexpr (kAll)
                sum.parts[i] += weight;
            else
                sum.parts[i] += x >= splat(least) ? weight : Floats{};
        }
    return fold(sum, [](Four a, Four b) { return a + b; });
}

void masses(const Candidates& c, Range blocks, float least, float* sums) {
    float room[kMassBlock];
    for (int64_t b = blocks.begin; b < blocks.end; ++b) {
        sums[b] = 0.0f;
        if (c.maxima[b] < least) continue;
        const float* block = whole_block(c.values, c.count, b, room);
        sums[b] =
            least == -__builtin_inff() ? mass_of<true>(block, c, least) : mass_of<false>(block, c, least);
    }
}

void weights_of_block(const Candidates& c, int64_t block, float* found) {
    float room[kMassBlock];
    const float* values = whole_block(c.values, c.count, block, room);
    for (int64_t at = 0; at < kMassBlock; at += kLanes) store(found + at, weight_of(load(values + at), c));
}
