// Products of small panels that stay in the caches: the multiply under every fused kernel.
//
// Each number of a result is a sum of chains of DEPTH fused multiply-adds in order of the inner
// index, whichever kernel computes it and wherever its row lies. A row's score therefore does not depend
// on the batch around it, on the number of threads, or on how the work was cut.
#pragma once

#if FASTOOD_WIDTH == 16
constexpr int MR = 14;  // rows held in registers: 14 x 2 sums, 2 classes, 1 image of 32 registers
#elif FASTOOD_WIDTH == 8
constexpr int MR = 6;   // 6 x 2 sums of 16 registers
#else
constexpr int MR = 4;
#endif
constexpr int NV = 2;         // vectors of columns held in registers
constexpr int NS = NV * W;    // columns a call computes; PANEL is a multiple
constexpr int64_t DEPTH = 128;  // longest chain: bounds the rounding, and a panel of it fits L1
static_assert(PANEL % NS == 0, "a panel is a whole number of register tiles");

// How the left factor lies in memory.
enum class Left {
    kChunks,   // [inner / CHUNK][rows][CHUNK]: packed image rows
    kColumns,  // a[inner * lda + row]: the transpose of a row-major block
};

// c[r, 0:NS] (+)= sum_k a[r, k] * b[k * ldb + 0:NS], r < R
template <int R, Left L, bool ADD>
static void tile(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t inner, float* c,
                 int64_t ldc) {
    vf s[R][NV];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v) s[r][v] = vf{};
    const int step = L == Left::kChunks ? CHUNK : 1;
    for (int64_t k0 = 0; k0 < inner; k0 += step) {
#pragma GCC unroll 4
        for (int k = 0; k < step; ++k) {
            vf columns[NV];
#pragma GCC unroll 2
            for (int v = 0; v < NV; ++v) columns[v] = load(b + v * W);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                const vf row = all(L == Left::kChunks ? a[r * CHUNK + k] : a[r]);
#pragma GCC unroll 2
                for (int v = 0; v < NV; ++v) s[r][v] = fma(row, columns[v], s[r][v]);
            }
            b += ldb;
        }
        a += L == Left::kChunks ? R * CHUNK : lda;
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v) {
            float* to = c + r * ldc + v * W;
            store(to, ADD ? load(to) + s[r][v] : s[r][v]);
        }
}

using Tile = void (*)(const float*, int64_t, const float*, int64_t, int64_t, float*, int64_t);

template <Left L, bool ADD>
static Tile tile_of(int64_t rows) {
    switch (rows) {
#define FASTOOD_CASE(R) \
    case R:             \
        return tile<(R <= MR ? R : MR), L, ADD>;
        FASTOOD_CASE(1) FASTOOD_CASE(2) FASTOOD_CASE(3) FASTOOD_CASE(4) FASTOOD_CASE(5)
        FASTOOD_CASE(6) FASTOOD_CASE(7) FASTOOD_CASE(8) FASTOOD_CASE(9) FASTOOD_CASE(10)
        FASTOOD_CASE(11) FASTOOD_CASE(12) FASTOOD_CASE(13)
#undef FASTOOD_CASE
        default:
            return tile<MR, L, ADD>;
    }
}

// Rows packed for tile<kChunks>: units of up to MR rows, each [inner / CHUNK][rows][CHUNK].
struct Packed {
    const float* data;
    int64_t rows;
    int64_t inner;  // padded to CHUNK
};

// Copies one row of floats (padded with zeros to `inner`) into its place among `rows`.
static inline void pack_row(const float* row, int64_t index, int64_t rows, int64_t inner,
                            float* packed) {
    const int64_t first = index / MR * MR;
    const int64_t height = rows - first < MR ? rows - first : MR;
    float* out = packed + first * inner + (index - first) * CHUNK;
    for (int64_t k = 0; k < inner; k += CHUNK, out += height * CHUNK)
        for (int v = 0; v < CHUNK / W; ++v) store(out + v * W, load(row + k + v * W));
}

// c[rows, columns] (+)= packed rows x b, where b comes in panels of PANEL columns, each
// [inner][PANEL] and panel_stride apart. c is row-major, its rows ldc apart; columns is padded to
// PANEL. One panel after the other: DEPTH rows of it stay in L1 while all rows of a pass.
template <bool ADD>
static void multiply(const Packed& a, const float* panels, int64_t panel_stride, int64_t columns,
                     float* c, int64_t ldc) {
    for (int64_t column = 0; column < columns; column += PANEL, panels += panel_stride)
        for (int64_t k = 0; k < a.inner; k += DEPTH) {
            const int64_t depth = a.inner - k < DEPTH ? a.inner - k : DEPTH;
            for (int64_t part = 0; part < PANEL; part += NS)
                for (int64_t row = 0; row < a.rows; row += MR) {
                    const int64_t height = a.rows - row < MR ? a.rows - row : MR;
                    const Tile tile = !ADD && k == 0 ? tile_of<Left::kChunks, false>(height)
                                                     : tile_of<Left::kChunks, true>(height);
                    tile(a.data + row * a.inner + k * height, 0, panels + k * PANEL + part, PANEL,
                         depth, c + row * ldc + column + part, ldc);
                }
        }
}

// Cosines of packed image rows with packed classes (pack.h).
static void multiply_panels(const Packed& a, const float* panels, int64_t columns, float* c,
                            int64_t ldc) {
    multiply<false>(a, panels, a.inner * PANEL, columns, c, ldc);
}

// Rows of a packed transpose multiplied together: 28 KB of it, so that a panel is read from further
// away a quarter as often.
constexpr int64_t TRANSPOSED = 4 * MR;

// c[n, columns] += g' x b for a row-major g [inner, n], its rows ldg apart, and b in panels. A piece
// of g is transposed first: read where it lies, every number would come from another cache line.
static void multiply_transposed(const float* g, int64_t ldg, int64_t inner, int64_t n,
                                const float* panels, int64_t panel_stride, int64_t columns,
                                float* c, int64_t ldc) {
    alignas(64) float packed[TRANSPOSED * DEPTH];
    for (int64_t k = 0; k < inner; k += DEPTH) {
        const int64_t depth = inner - k < DEPTH ? inner - k : DEPTH, even = depth / CHUNK * CHUNK;
        for (int64_t first = 0; first < n; first += TRANSPOSED) {
            const int64_t rows = n - first < TRANSPOSED ? n - first : TRANSPOSED;
            const float* from = g + k * ldg + first;
            for (int64_t row = 0; row < rows; row += MR) {
                const int64_t height = rows - row < MR ? rows - row : MR;
                float* to = packed + row * even;
                for (int64_t i = 0; i < even; i += CHUNK)
                    for (int64_t r = 0; r < height; ++r, to += CHUNK)
                        for (int64_t j = 0; j < CHUNK; ++j) to[j] = from[(i + j) * ldg + row + r];
            }
            for (int64_t column = 0; column < columns; column += NS) {
                const float* b = panels + column / PANEL * panel_stride + k * PANEL + column % PANEL;
                for (int64_t row = 0; row < rows; row += MR) {
                    const int64_t height = rows - row < MR ? rows - row : MR;
                    float* to = c + (first + row) * ldc + column;
                    tile_of<Left::kChunks, true>(height)(packed + row * even, 0, b, PANEL, even, to,
                                                         ldc);
                    if (even < depth)  // what the chunks leave
                        tile_of<Left::kColumns, true>(height)(from + even * ldg + row, ldg,
                                                              b + even * PANEL, PANEL, depth - even,
                                                              to, ldc);
                }
            }
        }
    }
}
