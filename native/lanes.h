// Vectors of the instruction set that a file is compiled for: all that differs between instruction sets.
//
// Everything is inline, and to be included in a namespace of the including file, which includes <immintrin.h>
// or <arm_neon.h> before it; nothing is taken from the C++ library: an inline function of that, compiled here
// for AVX-512, could be the copy that the linker keeps for the whole module. Files that include this are
// compiled with -ffp-contract=off: what is fused is written as fma(), so that each template computes the same
// bits.
#define INLINE inline __attribute__((always_inline))
// A loop over registers, unrolled: left a loop, it would keep them in memory.
#if defined(__clang__)
#define EACH(i, count) _Pragma("unroll") for (int i = 0; i < count; ++i)
#else
#define EACH(i, count) _Pragma("GCC unroll 32") for (int i = 0; i < count; ++i)
#endif

#if defined(__AVX512F__)
constexpr int kLanes = 16, kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kRegisters = 32;
#else
constexpr int kLanes = 4, kRegisters = 16;
#endif

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));
typedef int16_t Shorts __attribute__((vector_size(kLanes * 4)));
typedef int8_t Bytes __attribute__((vector_size(kLanes * 4)));
typedef int8_t FewBytes __attribute__((vector_size(kLanes)));

INLINE Floats splat(float x) { return x - Floats{}; }
INLINE Ints splat(int32_t x) { return x - Ints{}; }
// b where one is no number, as the instructions have it: GCC compares and blends where it does not see that.
#if defined(__AVX512F__)
INLINE Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }
INLINE Floats smaller(Floats a, Floats b) { return _mm512_min_ps(a, b); }
#elif defined(__AVX2__)
INLINE Floats larger(Floats a, Floats b) { return _mm256_max_ps(a, b); }
INLINE Floats smaller(Floats a, Floats b) { return _mm256_min_ps(a, b); }
#else
INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }
INLINE Floats smaller(Floats a, Floats b) { return a < b ? a : b; }
#endif
INLINE Floats absolute(Floats x) { return (Floats)((Ints)x & 0x7fffffff); }
INLINE Floats to_floats(Ints x) { return __builtin_convertvector(x, Floats); }

template <class Vector>
INLINE Vector load_as(const void* from) {
    Vector x;
    __builtin_memcpy(&x, from, sizeof x);
    return x;
}
INLINE Floats load(const float* from) { return load_as<Floats>(from); }
INLINE void store(float* to, Floats x) { __builtin_memcpy(to, &x, sizeof x); }

// a · b + c, rounded once where the instruction set has it (all but the baseline of x86-64).
INLINE Floats fma(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
    return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
    return vfmaq_f32(c, a, b);
#else
    return a * b + c;
#endif
}
// The same, rounded once everywhere. The baseline adds in 64 bits, rounds to odd, and only then to 32: of two
// roundings one after the other, the second would meet ties that the first has made (Boldo, Melquiond 2008).
INLINE Floats fused(Floats a, Floats b, Floats c) {
#if defined(__AVX2__) || defined(__aarch64__)
    return fma(a, b, c);
#else
    typedef double Wide __attribute__((vector_size(kLanes * 8)));
    typedef int64_t WideInts __attribute__((vector_size(kLanes * 8)));
    const Wide x = __builtin_convertvector(a, Wide) * __builtin_convertvector(b, Wide);  // is exact
    const Wide y = __builtin_convertvector(c, Wide), sum = x + y, part = sum - x;
    const Wide lost = (x - (sum - part)) + (y - part);
    const WideInts bits = (WideInts)sum, towards = (((WideInts)lost ^ bits) >> 63) | 1;
    const WideInts odd = bits + (towards & (lost != Wide{}) & ((bits & 1) - 1));
    return __builtin_convertvector((Wide)odd, Floats);
#endif
}

template <class Half, class Whole>
INLINE Half half(Whole x, int which) {
    Half y;
    __builtin_memcpy(&y, (const char*)&x + which * sizeof y, sizeof y);
    return y;
}
typedef float Four __attribute__((vector_size(16)));
INLINE float larger(float a, float b) { return a > b ? a : b; }
INLINE float sum(Four x) { return (x[0] + x[2]) + (x[1] + x[3]); }
INLINE float largest(Four x) { return larger(larger(x[0], x[2]), larger(x[1], x[3])); }
#if defined(__AVX2__)
typedef float Eight __attribute__((vector_size(32)));
INLINE float sum(Eight x) { return sum(half<Four>(x, 0) + half<Four>(x, 1)); }
INLINE float largest(Eight x) {
    const Four low = half<Four>(x, 0), high = half<Four>(x, 1);
    return largest(low > high ? low : high);
}
#endif
#if defined(__AVX512F__)
INLINE float sum(Floats x) { return sum(half<Eight>(x, 0) + half<Eight>(x, 1)); }
INLINE float largest(Floats x) {
    const Eight low = half<Eight>(x, 0), high = half<Eight>(x, 1);
    return largest(low > high ? low : high);
}
#endif

// The nearest integers of |x| < 2^22, ties to even.
INLINE Floats rounded(Floats x) {
    const Floats magic = splat(12582912.0f);  // 1.5 · 2^23: the sum has no bits left for a fraction
    return (x + magic) - magic;
}

// 2^x of |x| up to 126 as whole · (1 + f · p).
struct Power {
    Floats whole, f, p;
};
INLINE Power power_of(Floats x) {
    const Floats magic = splat(12582912.0f);
    const Floats shifted = x + magic;  // the nearest integer is in the low bits
    const Floats f = x - (shifted - magic);
    Floats p = splat(1.52527338e-5f);  // ln(2)^k / k!, k = 7 … 1
    p = fma(p, f, splat(1.54035304e-4f));
    p = fma(p, f, splat(1.33335581e-3f));
    p = fma(p, f, splat(9.61812911e-3f));
    p = fma(p, f, splat(5.55041087e-2f));
    p = fma(p, f, splat(2.40226507e-1f));
    p = fma(p, f, splat(6.93147181e-1f));
    return {(Floats)((((Ints)shifted - (Ints)magic) + 127) << 23), f, p};
}

// 2^x, relative error below 2e-7; 0 below -126, and x up to 126.
INLINE Floats exp2(Floats x) {
    const Power power = power_of(larger(x, splat(-126.0f)));
    const Floats y = fma(power.p, power.f, splat(1.0f)) * power.whole;
    return x < splat(-126.0f) ? Floats{} : y;
}

// 2^x - 1, x from 0 to 126, relative error below 3e-7 for small x, too.
INLINE Floats exp2_less_one(Floats x) {
    const Power power = power_of(x);
    return fma(power.p * power.f, power.whole, power.whole - splat(1.0f));
}

// --- Numbers of fewer bits

// By intrinsics where there are some: GCC takes a vector of bytes apart one by one. to_bytes takes integers
// within ±127.
#if defined(__AVX512F__)
INLINE void to_bytes(int8_t* to, Floats x) {
    const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x));
    __builtin_memcpy(to, &bytes, sizeof bytes);
}
INLINE Floats from_bytes(const int8_t* from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_as<__m128i>(from)));
}
INLINE Floats from_bfloat16(const uint16_t* from) {
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_as<__m256i>(from)), 16);
}
#elif defined(__AVX2__)
INLINE void to_bytes(int8_t* to, Floats x) {
    const __m256i ints = _mm256_cvtps_epi32(x);
    const __m128i shorts = _mm_packs_epi32(_mm256_castsi256_si128(ints), _mm256_extracti128_si256(ints, 1));
    _mm_storel_epi64((__m128i*)to, _mm_packs_epi16(shorts, shorts));
}
INLINE Floats from_bytes(const int8_t* from) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)));
}
INLINE Floats from_bfloat16(const uint16_t* from) {
    return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_as<__m128i>(from)), 16);
}
#else
INLINE void to_bytes(int8_t* to, Floats x) {
    const FewBytes bytes = __builtin_convertvector(__builtin_convertvector(x, Ints), FewBytes);
    __builtin_memcpy(to, &bytes, sizeof bytes);
}
INLINE Floats from_bytes(const int8_t* from) {
    return to_floats(__builtin_convertvector(load_as<FewBytes>(from), Ints));
}
INLINE Floats from_bfloat16(const uint16_t* from) {
    typedef uint16_t Few __attribute__((vector_size(kLanes * 2)));
    typedef uint32_t Wide __attribute__((vector_size(kLanes * 4)));
    return (Floats)(__builtin_convertvector(load_as<Few>(from), Wide) << 16);
}
#endif

#if defined(__AVX512F__)
INLINE Floats from_half(const uint16_t* from) { return _mm512_cvtph_ps(load_as<__m256i>(from)); }
INLINE void to_half(uint16_t* to, Floats x) {
    const __m256i half = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
    __builtin_memcpy(to, &half, sizeof half);
}
#elif defined(__AVX2__)
INLINE Floats from_half(const uint16_t* from) { return _mm256_cvtph_ps(load_as<__m128i>(from)); }
INLINE void to_half(uint16_t* to, Floats x) {
    const __m128i half = _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
    __builtin_memcpy(to, &half, sizeof half);
}
#elif defined(__aarch64__)
INLINE Floats from_half(const uint16_t* from) { return vcvt_f32_f16(load_as<float16x4_t>(from)); }
INLINE void to_half(uint16_t* to, Floats x) {
    const float16x4_t half = vcvt_f16_f32(x);
    __builtin_memcpy(to, &half, sizeof half);
}
#else
INLINE float half_as_float(uint16_t half) {
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16, magnitude = half & 0x7fff;
    uint32_t bits = (magnitude << 13) + (112u << 23);  // the exponent counts from 127, not from 15
    if (magnitude >= 0x7c00) bits += 112u << 23;       // infinity, NaN
    float x = __builtin_bit_cast(float, bits);
    if (magnitude < 0x0400) x = (float)magnitude * 5.96046448e-8f;  // below 2^-14: multiples of 2^-24
    return __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, x) | sign);
}
INLINE uint16_t float_as_half(float x) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, x), sign = (bits >> 16) & 0x8000;
    const uint32_t magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return (uint16_t)(sign | 0x7e00);   // NaN
    if (magnitude >= 0x477ff000) return (uint16_t)(sign | 0x7c00);  // rounds beyond 65,504
    if (magnitude < 0x38800000) {  // below 2^-14: the sum leaves multiples of 2^-24 in the low bits, rounded
        const float sum = __builtin_bit_cast(float, magnitude) + 0.5f;
        return (uint16_t)(sign | (__builtin_bit_cast(uint32_t, sum) - 0x3f000000u));
    }
    const uint32_t even = magnitude + 0xfff + ((magnitude >> 13) & 1);
    return (uint16_t)(sign | ((even - (112u << 23)) >> 13));
}
INLINE Floats from_half(const uint16_t* from) {
    Floats x;
    EACH (i, kLanes) x[i] = half_as_float(from[i]);
    return x;
}
INLINE void to_half(uint16_t* to, Floats x) {
    EACH (i, kLanes) to[i] = float_as_half(x[i]);
}
#endif

// --- Products of integers: in each lane, the sum of four codes times four inputs
//
// Codes are unsigned, inputs are signed: within ±127. Sum4 takes codes of 4 bits, at most 8 times before
// total(); Sum8 takes codes of 8 bits, 128 more than the weight. `start` makes up for what the codes are too
// large by: it is minus eight times the sum of all inputs.

// Has x in a register now: GCC puts sums off until their last use, and keeps all that they add up in memory.
#if defined(__AVX512F__)
#define SETTLE(x) asm("" : "+v"(x))
#elif defined(__AVX2__)
#define SETTLE(x) asm("" : "+x"(x))
#endif

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
struct Sum4 {
    static INLINE Ints begin(int32_t start) { return splat(start); }
    static INLINE Ints add(Ints sums, Bytes codes, Bytes inputs) {
#if defined(__AVX512F__)
        return (Ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)codes, (__m512i)inputs);
#else
        return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)codes, (__m256i)inputs);
#endif
    }
    static INLINE Ints total(Ints sums, int32_t) { return sums; }
};
struct Sum8 : Sum4 {
    static INLINE Ints begin(int32_t start) { return splat(start) << 4; }
};
#elif defined(__AVX2__)
#if defined(__AVX512F__)
INLINE Shorts pair_products(Bytes codes, Bytes inputs) {
    return (Shorts)_mm512_maddubs_epi16((__m512i)codes, (__m512i)inputs);
}
INLINE Ints pair_sums(Shorts x) { return (Ints)_mm512_madd_epi16((__m512i)x, _mm512_set1_epi16(1)); }
INLINE Bytes with_sign(Bytes x, Bytes of) {
    const __m512i inputs = (__m512i)x;
    return (Bytes)_mm512_mask_sub_epi8(inputs, _mm512_movepi8_mask((__m512i)of), __m512i{}, inputs);
}
INLINE Bytes absolute(Bytes x) { return (Bytes)_mm512_abs_epi8((__m512i)x); }
#else
INLINE Shorts pair_products(Bytes codes, Bytes inputs) {
    return (Shorts)_mm256_maddubs_epi16((__m256i)codes, (__m256i)inputs);
}
INLINE Ints pair_sums(Shorts x) { return (Ints)_mm256_madd_epi16((__m256i)x, _mm256_set1_epi16(1)); }
INLINE Bytes with_sign(Bytes x, Bytes of) { return (Bytes)_mm256_sign_epi8((__m256i)x, (__m256i)of); }
INLINE Bytes absolute(Bytes x) { return (Bytes)_mm256_abs_epi8((__m256i)x); }
#endif
struct Sum4 {  // in 16 bits: 8 · 2 · 15 · 127 is below 2^15
    static INLINE Ints begin(int32_t) { return Ints{}; }
    static INLINE Ints add(Ints sums, Bytes codes, Bytes inputs) {
        Shorts more = (Shorts)sums + pair_products(codes, inputs);
        SETTLE(more);
        return (Ints)more;
    }
    static INLINE Ints total(Ints sums, int32_t start) { return pair_sums((Shorts)sums) + splat(start); }
};
struct Sum8 {  // |weight| times the input with the weight's sign: 2 · 128 · 127 is below 2^15
    static INLINE Ints begin(int32_t) { return Ints{}; }
    static INLINE Ints add(Ints sums, Bytes codes, Bytes inputs) {
        const Bytes weights = codes ^ (int8_t)-128;
        sums += pair_sums(pair_products(absolute(weights), with_sign(inputs, weights)));
        SETTLE(sums);
        return sums;
    }
    static INLINE Ints total(Ints sums, int32_t) { return sums; }
};
#elif defined(__ARM_FEATURE_DOTPROD)
struct Sum4 {
    static INLINE Ints begin(int32_t start) { return splat(start); }
    static INLINE Ints add(Ints sums, Bytes codes, Bytes inputs) {
        return (Ints)vdotq_s32(sums, codes, inputs);
    }
    static INLINE Ints total(Ints sums, int32_t) { return sums; }
};
struct Sum8 {
    static INLINE Ints begin(int32_t) { return Ints{}; }
    static INLINE Ints add(Ints sums, Bytes codes, Bytes inputs) {
        return (Ints)vdotq_s32(sums, codes ^ (int8_t)-128, inputs);
    }
    static INLINE Ints total(Ints sums, int32_t) { return sums; }
};
#else
INLINE Ints four_products(Bytes a, Bytes b) {
    typedef int16_t Wide __attribute__((vector_size(kLanes * 8)));
    const Wide products = __builtin_convertvector(a, Wide) * __builtin_convertvector(b, Wide);
    Ints sums{};
    EACH (i, kLanes)
        sums[i] = (products[4 * i] + products[4 * i + 1]) + (products[4 * i + 2] + products[4 * i + 3]);
    return sums;
}
struct Sum4 {
    static INLINE Ints begin(int32_t start) { return splat(start); }
    static INLINE Ints add(Ints sums, Bytes codes, Bytes inputs) {
        return sums + four_products(codes, inputs);
    }
    static INLINE Ints total(Ints sums, int32_t) { return sums; }
};
struct Sum8 {
    static INLINE Ints begin(int32_t) { return Ints{}; }
    static INLINE Ints add(Ints sums, Bytes codes, Bytes inputs) {
        return sums + four_products(codes ^ (int8_t)-128, inputs);
    }
    static INLINE Ints total(Ints sums, int32_t) { return sums; }
};
#endif
