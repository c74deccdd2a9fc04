// Compiled once for each instruction set, into namespace BEDPLATE_ISA; see CMakeLists.txt.
//
// Takes nothing from the C++ library: an inline function of it, compiled here for AVX-512, could be the copy
// that the linker keeps for the whole module.
#include "attention_tile.h"

namespace bedplate::BEDPLATE_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kAccumulators = 24;  // of 32 registers
#elif defined(__AVX2__)
constexpr int kLanes = 8, kAccumulators = 12;  // of 16
#elif defined(__aarch64__)
constexpr int kLanes = 4, kAccumulators = 24;  // of 32
#else
constexpr int kLanes = 4, kAccumulators = 12;  // of 16
#endif
#define INLINE inline __attribute__((always_inline))
// A loop over registers, unrolled: left a loop, it would keep them in memory.
#if defined(__clang__)
#define EACH(i, count) _Pragma("unroll") for (int i = 0; i < count; ++i)
#else
#define EACH(i, count) _Pragma("GCC unroll 24") for (int i = 0; i < count; ++i)
#endif

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t IntVec __attribute__((vector_size(kLanes * sizeof(int32_t))));

constexpr int kRowVecs = 4;                   // a tile's rows lie in the lanes of this many vectors
constexpr int64_t kRows = kRowVecs * kLanes;  //
constexpr int64_t kKeyBlock = 64;             // keys a pass: their scores, and V for PV, stay in the L1 cache
constexpr int64_t kDotRows = 4;      // up to here, rows · keys as dot products beats lanes full of rows
constexpr int64_t kFetchAhead = 8;   // keys between asking for a row of K or V and its use
constexpr int64_t kKeyStep = 4;      // keys of V for one head before the next: memory is read in a row
constexpr int64_t kLineFloats = 16;  // of a cache line
constexpr float kMasked = -1e30f;    // finite, so that a row masked throughout makes no NaN

INLINE Vec load(const float* from) {
    Vec x;
    __builtin_memcpy(&x, from, sizeof x);
    return x;
}
INLINE void store(float* to, Vec x) { __builtin_memcpy(to, &x, sizeof x); }
INLINE Vec splat(float x) { return x - Vec{}; }
INLINE Vec larger(Vec a, Vec b) { return a > b ? a : b; }

template <class Half, class Whole>
INLINE Half fold(Whole x) {
    Half low, high;
    __builtin_memcpy(&low, &x, sizeof low);
    __builtin_memcpy(&high, (const char*)&x + sizeof low, sizeof high);
    return low + high;
}

typedef float Four __attribute__((vector_size(16)));
INLINE float sum(Four x) { return (x[0] + x[2]) + (x[1] + x[3]); }
#if defined(__AVX2__)
typedef float Eight __attribute__((vector_size(32)));
INLINE float sum(Eight x) { return sum(fold<Four>(x)); }
#endif
#if defined(__AVX512F__)
INLINE float sum(Vec x) { return sum(fold<Eight>(x)); }
#endif

// 2^x for x ≤ 0, relative error below 2e-7; 0 below -126.
INLINE Vec exp2(Vec x) {
    const Vec clamped = larger(x, splat(-126.0f));
    const Vec magic = splat(12582912.0f);  // 1.5 · 2^23: adding it leaves the nearest integer in the low bits
    const Vec shifted = clamped + magic;
    const Vec f = clamped - (shifted - magic);  // in [-0.5, 0.5]
    Vec p = splat(1.52527338e-5f);              // ln(2)^k / k!, k = 7 … 0
    p = p * f + splat(1.54035304e-4f);
    p = p * f + splat(1.33335581e-3f);
    p = p * f + splat(9.61812911e-3f);
    p = p * f + splat(5.55041087e-2f);
    p = p * f + splat(2.40226507e-1f);
    p = p * f + splat(6.93147181e-1f);
    p = p * f + splat(1.0f);
    const IntVec power = (((IntVec)shifted - (IntVec)magic) + 127) << 23;
    return x < splat(-126.0f) ? Vec{} : p * (Vec)power;
}

// scores [N keys, ·] = K Qᵀ for V vectors of rows: `q` is [D, ld], rows in lanes.
template <int V, int N>
INLINE void score_lanes(const float* q, int64_t ld, const float* k, int64_t k_stride, int64_t depth,
                        float* out) {
    Vec a[N][V];
    EACH (n, N)
        EACH (v, V) a[n][v] = Vec{};
    for (int64_t d = 0; d < depth; ++d)
        EACH (n, N)
            EACH (v, V) a[n][v] += load(q + d * ld + v * kLanes) * k[n * k_stride + d];
    EACH (n, N)
        EACH (v, V) store(out + n * ld + v * kLanes, a[n][v]);
}

// The same for M rows as dot products: `q` is [M, D].
template <int M, int N>
INLINE void score_dots(const float* q, int64_t ld, const float* k, int64_t k_stride, int64_t depth,
                       float* out) {
    Vec a[N][M];
    EACH (n, N)
        EACH (m, M) a[n][m] = Vec{};
    int64_t d = 0;
    for (; d + kLanes <= depth; d += kLanes)
        EACH (n, N) {
            const Vec key = load(k + n * k_stride + d);
            EACH (m, M) a[n][m] += load(q + m * depth + d) * key;
        }
    EACH (n, N)
        EACH (m, M) {
            float total = sum(a[n][m]);
            for (int64_t rest = d; rest < depth; ++rest)
                total += q[m * depth + rest] * k[n * k_stride + rest];
            out[n * ld + m] = total;
        }
}

struct Lanes {
    template <int V, int N>
    static INLINE void score(const float* q, int64_t ld, const float* k, int64_t ks, int64_t d, float* out) {
        score_lanes<V, N>(q, ld, k, ks, d, out);
    }
};
struct Dots {
    template <int M, int N>
    static INLINE void score(const float* q, int64_t ld, const float* k, int64_t ks, int64_t d, float* out) {
        score_dots<M, N>(q, ld, k, ks, d, out);
    }
};

// Memory is slower than all the arithmetic of a decode, and the hardware foresees less than is needed.
INLINE void fetch(const AttentionTile& t, const float* at, int64_t keys) {
    for (int64_t i = 0; i < keys; ++i)
        for (int64_t d = 0; d < t.heads * t.head_dim; d += kLineFloats)
            __builtin_prefetch(at + (kFetchAhead + i) * t.kv_stride + d);
}

template <class How, int R>
void score_block(const AttentionTile& t, const float* q, int64_t ld, int64_t key, int64_t n, float* out) {
    constexpr int kKeys = kAccumulators / R < 8 ? kAccumulators / R : 8;
    const int64_t rows = t.row_end - t.row_begin, depth = t.head_dim;
    const float* k = t.k + key * t.kv_stride;
    int64_t i = 0;
    for (; i + kKeys <= n; i += kKeys) {
        fetch(t, k + i * t.kv_stride, kKeys);
        for (int64_t h = 0; h < t.heads; ++h)
            How::template score<R, kKeys>(q + h * rows * depth, ld, k + i * t.kv_stride + h * depth,
                                          t.kv_stride, depth, out + i * ld + h * rows);
    }
    for (; i < n; ++i)
        for (int64_t h = 0; h < t.heads; ++h)
            How::template score<R, 1>(q + h * rows * depth, ld, k + i * t.kv_stride + h * depth, t.kv_stride,
                                      depth, out + i * ld + h * rows);
}

template <class How>
void score_rows(int rows, const AttentionTile& t, const float* q, int64_t ld, int64_t key, int64_t n,
                float* out) {
    switch (rows) {
        case 1:
            return score_block<How, 1>(t, q, ld, key, n, out);
        case 2:
            return score_block<How, 2>(t, q, ld, key, n, out);
        case 3:
            return score_block<How, 3>(t, q, ld, key, n, out);
        default:
            return score_block<How, 4>(t, q, ld, key, n, out);
    }
}

// acc [M rows, C vectors from column d] += P V, for n keys; `p` is [n, ld].
template <int M, int C>
INLINE void weigh(const AttentionTile& t, const float* p, int64_t ld, const float* v, int64_t n, float* acc) {
    Vec a[M][C];
    EACH (m, M)
        EACH (c, C) a[m][c] = load(acc + m * t.head_dim + c * kLanes);
    for (int64_t i = 0; i < n; ++i)
        EACH (c, C) {
            const Vec value = load(v + i * t.kv_stride + c * kLanes);
            EACH (m, M) a[m][c] += value * p[i * ld + m];
        }
    EACH (m, M)
        EACH (c, C) store(acc + m * t.head_dim + c * kLanes, a[m][c]);
}

// Columns from d on, C vectors at once, and half as many of what is left; returns the first that fills none.
template <int M, int C>
INLINE int64_t weigh_columns(const AttentionTile& t, const float* p, int64_t ld, const float* v, int64_t n,
                             float* acc, int64_t d) {
    for (; d + C * kLanes <= t.head_dim; d += C * kLanes) weigh<M, C>(t, p, ld, v + d, n, acc + d);
    if constexpr (C > 1)
        return weigh_columns<M, C / 2>(t, p, ld, v, n, acc, d);
    else
        return d;
}

template <int M>
void weigh_rows(const AttentionTile& t, const float* p, int64_t ld, const float* v, int64_t n, float* acc) {
    constexpr int kMost = kAccumulators / M, kColumns = kMost >= 8 ? 8 : kMost >= 4 ? 4 : 2;
    for (int64_t d = weigh_columns<M, kColumns>(t, p, ld, v, n, acc, 0); d < t.head_dim; ++d)
        for (int64_t i = 0; i < n; ++i)
            for (int m = 0; m < M; ++m) acc[m * t.head_dim + d] += p[i * ld + m] * v[i * t.kv_stride + d];
}

// One head's rows; `v` is its first key of n.
void weigh_head(const AttentionTile& t, const float* p, int64_t ld, const float* v, int64_t n, float* acc) {
    const int64_t rows = t.row_end - t.row_begin;
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) weigh_rows<4>(t, p + r, ld, v, n, acc + r * t.head_dim);
    float* rest = acc + r * t.head_dim;
    switch (rows - r) {
        case 3:
            return weigh_rows<3>(t, p + r, ld, v, n, rest);
        case 2:
            return weigh_rows<2>(t, p + r, ld, v, n, rest);
        case 1:
            return weigh_rows<1>(t, p + r, ld, v, n, rest);
    }
}

void weigh_block(const AttentionTile& t, const float* p, int64_t ld, int64_t key, int64_t n,
                 const float* decay, float* acc) {
    const int64_t rows = t.row_end - t.row_begin, depth = t.head_dim;
    for (int64_t r = 0; r < t.heads * rows; ++r)
        for (int64_t d = 0; d < depth; ++d) acc[r * depth + d] *= decay[r];
    const int64_t step = t.heads == 1 ? n : kKeyStep;
    for (int64_t i = 0; i < n; i += step) {
        const float* v = t.v + (key + i) * t.kv_stride;
        const int64_t count = n - i < step ? n - i : step;
        fetch(t, v, count);
        for (int64_t h = 0; h < t.heads; ++h)
            weigh_head(t, p + i * ld + h * rows, ld, v + h * depth, count, acc + h * rows * depth);
    }
}

// Online softmax (Milakov & Gimelshein 2018) over one block: scores [n, ld] become 2^(score − max) in place.
void soften_block(int vecs, int64_t ld, int64_t key, int64_t n, bool masked, const int32_t* last_key,
                  float* scores, float* max, float* sum, float* decay) {
    for (int v = 0; v < vecs; ++v) {
        float* s = scores + v * kLanes;
        const int64_t at = v * kLanes;
        if (masked) {
            IntVec last;
            __builtin_memcpy(&last, last_key + at, sizeof last);
            for (int64_t i = 0; i < n; ++i) {
                const IntVec position = (int32_t)(key + i) - IntVec{};
                store(s + i * ld, position > last ? splat(kMasked) : load(s + i * ld));
            }
        }
        const Vec before = load(max + at);
        Vec now = before;
        for (int64_t i = 0; i < n; ++i) now = larger(now, load(s + i * ld));
        const Vec fade = exp2(before - now);
        Vec total = load(sum + at) * fade;
        for (int64_t i = 0; i < n; ++i) {
            const Vec p = exp2(load(s + i * ld) - now);
            total += p;
            store(s + i * ld, p);
        }
        store(max + at, now);
        store(sum + at, total);
        store(decay + at, fade);
    }
}

// Scaled queries: [D, ld] with rows in lanes, or [heads · rows, D] for the dot products.
void gather_queries(const AttentionTile& t, bool dots, int64_t ld, float* q) {
    const int64_t rows = t.row_end - t.row_begin, depth = t.head_dim;
    for (int64_t r = 0; r < t.heads * rows; ++r) {
        const int64_t row = t.row_begin + r % rows, head = r / rows * t.group + row % t.group;
        const float* from = t.q + row / t.group * t.q_stride + head * depth;
        for (int64_t d = 0; d < depth; ++d) q[dots ? r * depth + d : d * ld + r] = from[d] * t.scale;
    }
    if (dots) return;
    for (int64_t r = rows; r < ld; ++r)
        for (int64_t d = 0; d < depth; ++d) q[d * ld + r] = 0;
}

int64_t heads_of(int64_t rows, int64_t kv_heads) {
    if (rows > kDotRows) return 1;
    return kv_heads * rows <= kRows ? kv_heads : kRows / rows;
}

int64_t scratch_floats(int64_t head_dim) { return kRows * (head_dim + kKeyBlock + 2); }

void run(const AttentionTile& t, float* scratch, float* acc, float* max, float* sum) {
    const int64_t rows = t.row_end - t.row_begin, all = t.heads * rows;
    const bool dots = rows <= kDotRows;
    const int vecs = (int)((all + kLanes - 1) / kLanes);
    const int64_t ld = vecs * kLanes;
    float* q = scratch;
    float* scores = q + kRows * t.head_dim;
    float* decay = scores + kRows * kKeyBlock;
    int32_t last_key[kRows];
    if (dots)  // which leave the lanes without a row as they are
        for (int64_t i = 0; i < kKeyBlock * vecs; ++i) store(scores + i * kLanes, Vec{});
    for (int64_t i = 0; i < all * t.head_dim; ++i) acc[i] = 0;
    for (int64_t r = 0; r < kRows; ++r) {
        last_key[r] = (int32_t)(t.start_pos + (t.row_begin + r % rows) / t.group);
        max[r] = kMasked;
        sum[r] = 0;
    }
    gather_queries(t, dots, ld, q);
    for (int64_t key = t.key_begin; key < t.key_end; key += kKeyBlock) {
        const int64_t n = t.key_end - key < kKeyBlock ? t.key_end - key : kKeyBlock;
        if (dots)
            score_rows<Dots>((int)rows, t, q, ld, key, n, scores);
        else
            score_rows<Lanes>(vecs, t, q, ld, key, n, scores);
        soften_block(vecs, ld, key, n, key + n - 1 > last_key[0], last_key, scores, max, sum, decay);
        weigh_block(t, scores, ld, key, n, decay, acc);
    }
}

}  // namespace

#define BEDPLATE_TEXT(x) #x
#define BEDPLATE_NAME(x) BEDPLATE_TEXT(x)
extern const TileKernel kernel;
const TileKernel kernel = {BEDPLATE_NAME(BEDPLATE_ISA), kRows, heads_of, scratch_floats, run};

}  // namespace bedplate::BEDPLATE_ISA
