// Products on the matrix unit (AMX, bfloat16) with the accuracy of float32.
//
// A float32 number is the sum of three bfloat16 numbers, high + middle + low, to its last bit; six of
// the nine products of two such sums carry all that float32 can hold (the others lie below 2^-24 of
// the result). The unit does 16 times the multiply-adds of AVX-512, so six products are 1.4 to 1.5
// times as fast as one in float32, and their sums, rounded less often, err a quarter as much
// (measured on one Xeon: 284 against 194 GF/s a core, rms 5e-9 against 2e-8 at D = 512).
// bfloat16 images are their own high part: three products, and 2.5 times as fast.
#pragma once

#define FASTOOD_AMX_TARGET __attribute__((target("amx-tile,amx-bf16")))

constexpr int64_t SQUARE = 32;         // rows and columns of a result: 2 x 2 tiles of 16 x 16
constexpr int64_t TILE = 16 * SLICE;   // bfloat16 numbers in a tile
constexpr int64_t PARTS = 3;           // high, middle, low
constexpr int64_t SLICES_DEEP = 8;     // slices summed in the tiles before they are added up
static_assert(SQUARE == PANEL, "a square is as wide as a panel");

struct SplitRows {
    const uint16_t* data;  // [rows / SQUARE][slices][parts][2 tiles]
    int64_t rows, slices, parts;
};

static inline lanes_i32 to_bfloat16(vf x) {  // to nearest even, as the upper half of a float
    const lanes_i32 bits = (lanes_i32)x;
    return (bits + 0x7fff + ((bits >> 16) & 1)) & (int32_t)0xffff0000;
}

// 16 numbers of `row` into parts; `out` strides from part to part by `stride`.
static inline void split(vf x, int64_t parts, uint16_t* out, int64_t stride) {
    for (int64_t p = 0; p < parts; ++p, out += stride) {
        const lanes_i32 high = to_bfloat16(x);
        const __m256i half = _mm512_cvtepi32_epi16((__m512i)(high >> 16));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), half);
        x = x - (vf)high;
    }
}

// Row `index` (padded to SLICE) of the left factor.
static inline void split_row(const float* row, int64_t index, int64_t slices, int64_t parts,
                             uint16_t* out) {
    out += index / SQUARE * slices * parts * 2 * TILE + index % SQUARE / 16 * TILE +
           index % 16 * SLICE;
    for (int64_t s = 0; s < slices; ++s, out += parts * 2 * TILE)
        for (int64_t k = 0; k < SLICE; k += 16)
            split(load(row + s * SLICE + k), parts, out + k, 2 * TILE);
}

// Classes first.. of `text`, checked and normalised if asked, in the order the unit reads: pairs of
// the inner index beside each other, [panel][slices][PARTS][2 tiles][16 pairs][16 classes][2].
static void split_classes(const Rows& text, bool normalize, int64_t first, int64_t count,
                          uint16_t* out, uint8_t* faults) {
    const int64_t slices = round_up(text.width, SLICE) / SLICE;
    float* row = scratch(1, slices * SLICE);
    uint16_t parts[PARTS * 16];
    for (int64_t k = first; k < round_up(first + count, PANEL); ++k) {
        if (k < first + count) {
            read_row(text, k, 0, text.width, slices * SLICE, row);
            faults[k] = prepare_row(row, slices * SLICE, normalize);
        } else {
            std::memset(row, 0, sizeof(float) * slices * SLICE);
        }
        uint16_t* to = out + k / PANEL * slices * SPLIT_SLICE + k % PANEL / 16 * TILE + k % 16 * 2;
        for (int64_t d = 0; d < slices * SLICE; d += 16) {
            split(load(row + d), PARTS, parts, 16);
            uint16_t* pairs = to + d / SLICE * SPLIT_SLICE + d % SLICE * 16;
            for (int64_t p = 0; p < PARTS; ++p)
                for (int64_t i = 0; i < 8; ++i)
                    std::memcpy(pairs + p * 2 * TILE + i * 32, parts + p * 16 + i * 2, 4);
        }
    }
}

struct alignas(64) TileShapes {
    uint8_t palette = 1, start = 0, reserved[14] = {0};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// out[32, 32] = a x b over `slices`. Tiles 0-3 hold the result, 4-5 rows, 6-7 classes; TALL: both
// tiles of rows are in use. Small products first, so that they are not lost on a large sum.
template <int64_t NP, bool TALL>
FASTOOD_AMX_TARGET static void square(const uint16_t* a, const uint16_t* b, int64_t slices,
                                      float* out) {
    _tile_zero(0);
    _tile_zero(1);
    if (TALL) {
        _tile_zero(2);
        _tile_zero(3);
    }
#define FASTOOD_LOAD_ROWS(PART)                                   \
    _tile_loadd(4, a + (PART) * 2 * TILE, 64);                    \
    if (TALL) _tile_loadd(5, a + (PART) * 2 * TILE + TILE, 64);
#define FASTOOD_LOAD_CLASSES(PART)              \
    _tile_loadd(6, b + (PART) * 2 * TILE, 64);  \
    _tile_loadd(7, b + (PART) * 2 * TILE + TILE, 64);
#define FASTOOD_MULTIPLY        \
    _tile_dpbf16ps(0, 4, 6);    \
    _tile_dpbf16ps(1, 4, 7);    \
    if (TALL) {                 \
        _tile_dpbf16ps(2, 5, 6); \
        _tile_dpbf16ps(3, 5, 7); \
    }
    for (int64_t s = 0; s < slices; ++s, a += NP * 2 * TILE, b += PARTS * 2 * TILE) {
        FASTOOD_LOAD_ROWS(0)
        FASTOOD_LOAD_CLASSES(2)
        FASTOOD_MULTIPLY
        FASTOOD_LOAD_CLASSES(1)
        FASTOOD_MULTIPLY
        if (NP == PARTS) {
            FASTOOD_LOAD_ROWS(1)
            FASTOOD_MULTIPLY
        }
        FASTOOD_LOAD_CLASSES(0)
        if (NP == PARTS) {
            FASTOOD_MULTIPLY
            FASTOOD_LOAD_ROWS(2)
            FASTOOD_MULTIPLY
            FASTOOD_LOAD_ROWS(0)
        }
        FASTOOD_MULTIPLY
    }
#undef FASTOOD_LOAD_ROWS
#undef FASTOOD_LOAD_CLASSES
#undef FASTOOD_MULTIPLY
    _tile_stored(0, out, 4 * SQUARE);
    _tile_stored(1, out + 16, 4 * SQUARE);
    if (TALL) {
        _tile_stored(2, out + 16 * SQUARE, 4 * SQUARE);
        _tile_stored(3, out + 16 * SQUARE + 16, 4 * SQUARE);
    }
}

using Square = void (*)(const uint16_t*, const uint16_t*, int64_t, float*);

// c[rows, columns] = rows x classes, as multiply_panels.
FASTOOD_AMX_TARGET static void multiply_split(const SplitRows& a, const uint16_t* panels,
                                              int64_t columns, float* c, int64_t ldc) {
    alignas(64) float out[SQUARE * SQUARE];
    // Whoever else uses the tiles in this thread (oneDNN does) finds them as they were set up.
    alignas(64) char before[64];
    _tile_storeconfig(before);
    TileShapes shapes;
    if (a.rows < 16)  // a product takes as long as its tile has rows
        shapes.rows[0] = shapes.rows[1] = shapes.rows[4] = static_cast<uint8_t>(a.rows);
    _tile_loadconfig(&shapes);
    for (int64_t column = 0; column < columns; column += PANEL, panels += a.slices * SPLIT_SLICE)
        for (int64_t s = 0; s < a.slices; s += SLICES_DEEP) {
            const int64_t deep = a.slices - s < SLICES_DEEP ? a.slices - s : SLICES_DEEP;
            for (int64_t row = 0; row < a.rows; row += SQUARE) {
                const int64_t height = a.rows - row < SQUARE ? a.rows - row : SQUARE;
                const bool tall = height > 16;
                const Square multiply = a.parts == 1 ? (tall ? square<1, true> : square<1, false>)
                                                     : (tall ? square<PARTS, true>
                                                             : square<PARTS, false>);
                multiply(a.data + (row * a.slices + s * SQUARE) * a.parts * SLICE,
                         panels + s * SPLIT_SLICE, deep, out);
                float* to = c + row * ldc + column;
                for (int64_t i = 0; i < height; ++i, to += ldc)
                    for (int64_t j = 0; j < PANEL; j += W)
                        store(to + j, s == 0 ? load(out + i * SQUARE + j)
                                             : load(to + j) + load(out + i * SQUARE + j));
            }
        }
    _tile_loadconfig(before);
}

// bfloat16 rows go in as they are; their norm is divided out of the products. A row whose squares
// would overflow or vanish is scaled by a power of two first, which changes none of its digits.
static Fault prepare_raw_row(float* row, int64_t padded, bool normalize, float* scale) {
    float squares = sum_of_squares(row, padded), power = 1.0f;
    *scale = 1.0f;  // also of a row that is left out: what it is multiplied by must be a number
    if (!(squares > 1e-30f && squares < 1e30f)) {
        const Fault fault = prepare_row(row, padded, false);
        if (fault != kFine) return fault;
        vf most{};
        for (int64_t k = 0; k < padded; k += W) most = larger(most, larger(load(row + k), -load(row + k)));
        power = __builtin_ldexpf(1.0f, -__builtin_ilogbf(largest(most)));
        if (power > 0x1p126f) power = 0x1p127f;  // of subnormals
        scale_row(row, padded, power);
        squares = sum_of_squares(row, padded);
    }
    *scale = normalize ? 1.0f / __builtin_sqrtf(squares) : 1.0f / power;
    return kFine;
}

// Rows first..first+rows of `image`, checked, and split for `multiply_split`. `scales` receives what
// their products have to be multiplied by (bfloat16), or is left alone and they have unit norm.
static SplitRows split_rows(const Rows& image, int64_t first, int64_t rows, bool normalize,
                            uint16_t* out, float* scales, uint8_t* faults) {
    const int64_t slices = round_up(image.width, SLICE) / SLICE, padded = slices * SLICE;
    const int64_t parts = image.type == Type::kBFloat16 ? 1 : PARTS;
    const int64_t tall = round_up(rows, SQUARE);
    float* row = scratch(1, padded);
    for (int64_t i = 0; i < tall; ++i) {
        if (i < rows) {
            read_row(image, first + i, 0, image.width, padded, row);
            const Fault fault = parts == 1
                                    ? prepare_raw_row(row, padded, normalize, scales + i)
                                    : prepare_row(row, padded, normalize);
            faults[first + i] = fault;
            if (fault != kFine) std::memset(row, 0, sizeof(float) * padded);
        } else {
            std::memset(row, 0, sizeof(float) * padded);
        }
        split_row(row, i, slices, parts, out);
    }
    return {out, rows, slices, parts};
}
