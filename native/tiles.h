// Products with many rows of inputs, by AMX: one instruction finds the sums of a group of columns for 16 rows
// of inputs and 16 of weights. They are the integers that Sum4 and Sum8 find, and are added up as in `tile`:
// the same bits.
//
// Part of kernels.cpp. A core multiplies floats at half its rate while its tiles work and some 100 ns after,
// so sums of several groups are found first and added up then.

constexpr int64_t kRun = 16;  // groups at once: their codes and sums stay in L1
constexpr int64_t kInputBytes =
    1 << 20;  // codes of the inputs that a block meets one after the other: they stay in L2
constexpr int64_t kMostRows = 256;   // and how many rows
constexpr int64_t kFewestRows = 12;  // below, to unpack weights takes longer than tiles save
constexpr int64_t kTileBytes = kBlock * kGroup;

// Groups of a block of weights as tiles take them, and as floats.
struct Run {
    alignas(64) int8_t codes[kRun][kTileBytes];
    alignas(64) float scales[kRun][kBlock], offsets[kRun][kBlock];
    int64_t count;
};

template <Coding C>
INLINE void unpack_codes(const uint8_t* from, int8_t* to) {
    if constexpr (C == Coding::kFour) {
        EACH (j, 4) {
            const Bytes both = load_as<Bytes>(from + j * 64);
            const Bytes low = (both & (int8_t)15) - (int8_t)8;
            const Bytes high = ((Bytes)((Shorts)both >> 4) & (int8_t)15) - (int8_t)8;
            __builtin_memcpy(to + j * 128, &low, sizeof low);
            __builtin_memcpy(to + j * 128 + 64, &high, sizeof high);
        }
    } else {
        EACH (j, 8) {
            const Bytes code = load_as<Bytes>(from + j * 64) ^ (int8_t)-128;
            __builtin_memcpy(to + j * 64, &code, sizeof code);
        }
    }
}

template <Coding C, bool kGroupScales, bool kOffsets>
void unpack(const Weights& w, int64_t block, int64_t groups, Range some, Run* to) {
    const Floats offset_scale = kOffsets ? load(w.offset_scales + block * kBlock) : Floats{};
    to->count = some.end - some.begin;
    for (int64_t i = 0; i < to->count; ++i) {
        const int64_t at = block * groups + some.begin + i;
        unpack_codes<C>(w.codes + at * code_bytes(C), to->codes[i]);
        if (kGroupScales) store(to->scales[i], from_bfloat16(w.group_scales + at * kBlock));
        if (kOffsets) store(to->offsets[i], from_bytes(w.offsets + at * kBlock) * offset_scale);
    }
}

// What tiles load and store is memory that the compiler does not know of.
#define TILES_TOUCH_MEMORY asm volatile("" ::: "memory")

struct TileConfig {
    uint8_t palette = 1, start = 0, unused[14] = {};
    uint16_t bytes[16] = {64, 64, kGroup, kGroup, 64, 64};  // of a row: sums, inputs, weights, two of each
    uint8_t rows[16] = {kSide, kSide, kSide, kSide, kGroup / 4, kGroup / 4};
};

typedef int32_t TileSums[kSide][kBlock];

INLINE void find_sums(const Run& run, const int8_t* inputs, TileSums* sums) {
    TILES_TOUCH_MEMORY;
    for (int64_t g = 0; g < run.count; g += 2) {
        _tile_loadd(2, inputs + g * kTileBytes, kGroup);
        _tile_loadd(4, run.codes[g], 64);
        _tile_zero(0);
        _tile_dpbssd(0, 2, 4);
        if (g + 1 < run.count) {
            _tile_loadd(3, inputs + (g + 1) * kTileBytes, kGroup);
            _tile_loadd(5, run.codes[g + 1], 64);
            _tile_zero(1);
            _tile_dpbssd(1, 3, 5);
            _tile_stored(1, sums[g + 1], 64);
        }
        _tile_stored(0, sums[g], 64);
    }
    TILES_TOUCH_MEMORY;
}

// T rows, from `first` of their tile on. `ahead` are weights to fetch by the way.
template <bool kGroupScales, bool kOffsets, int T>
void add_run(const Run& run, const int8_t* codes, const InputGroup* groups, int64_t first,
             const uint8_t* ahead, float* y) {
    alignas(64) TileSums sums[kRun];
    find_sums(run, codes, sums);
    Floats acc[T];
    EACH (t, T) acc[t] = load(y + t * kBlock);
    for (int64_t g = 0; g < run.count; ++g) {
        __builtin_prefetch(ahead + g * 64, 0, 2);
        const Floats scale = kGroupScales ? load(run.scales[g]) : Floats{};
        const Floats offset = kOffsets ? load(run.offsets[g]) : Floats{};
        EACH (t, T) {
            const InputGroup& group = groups[g * kSide + first + t];
            const Floats total = to_floats(load_as<Ints>(sums[g][first + t]));
            acc[t] = fma(kGroupScales ? total * scale : total, splat(group.scale), acc[t]);
            if (kOffsets) acc[t] = fma(offset, splat(group.sum), acc[t]);
        }
    }
    EACH (t, T) store(y + t * kBlock, acc[t]);
}

template <Coding C, bool kGroupScales, bool kOffsets>
void block_by_tiles(const Weights& w, const Inputs& x, Range rows, int64_t block, float* out, int64_t stride,
                    bool add) {
    Run run;
    alignas(64) float sums[kMostRows * kBlock] = {};
    const int64_t runs = (x.n_groups + kRun - 1) / kRun;
    for (int64_t r = 0; r < runs; ++r) {
        const int64_t begin = x.n_groups * r / runs, end = x.n_groups * (r + 1) / runs;
        unpack<C, kGroupScales, kOffsets>(w, block, x.n_groups, {begin, end}, &run);
        const uint8_t* ahead = w.codes + (block * x.n_groups + end) * code_bytes(C);
        for (int64_t row = rows.begin, next; row < rows.end; row = next) {
            const int64_t tile = row / kSide * kSide, place = x.place(tile) + begin * kSide;
            next = tile + kSide < rows.end ? tile + kSide : rows.end;
            float* y = sums + (row - rows.begin) * kBlock;
            if (end == x.n_groups)
                for (int64_t i = row; i < next; ++i) __builtin_prefetch(out + i * stride + block * kBlock, 1);
            constexpr decltype(&add_run<kGroupScales, kOffsets, 4>) kAdd[] = {
                add_run<kGroupScales, kOffsets, 4>, add_run<kGroupScales, kOffsets, 8>,
                add_run<kGroupScales, kOffsets, 12>, add_run<kGroupScales, kOffsets, 16>};
            kAdd[(next - row) / 4 - 1](run, x.codes + place * kGroup, x.groups + place, row - tile, ahead, y);
            ahead += run.count * 64;
            if (end == x.n_groups)
                for (int64_t i = row; i < next; ++i, y += kBlock)
                    finish_row<C, kGroupScales>(w, block, 0, load(y), out + i * stride, add);
        }
    }
}

// Rows in whole fours.
template <Coding C, bool kGroupScales, bool kOffsets>
void product_by_tiles(const Weights& w, const Inputs& x, Range rows, Range blocks, float* out, int64_t stride,
                      bool add) {
    const TileConfig config;
    asm volatile("" ::"r"(&config) : "memory");
    _tile_loadconfig(&config);
    const int64_t fitting = kInputBytes / (x.n_groups * kGroup) / kSide * kSide;
    const int64_t most = fitting < kSide ? kSide : fitting < kMostRows ? fitting : kMostRows;
    for (int64_t row = rows.begin, next; row < rows.end; row = next) {
        next = (row + most) / kSide * kSide < rows.end ? (row + most) / kSide * kSide : rows.end;
        for (int64_t block = blocks.begin; block < blocks.end; ++block)
            block_by_tiles<C, kGroupScales, kOffsets>(w, x, {row, next}, block, out, stride, add);
    }
    _tile_release();
}
