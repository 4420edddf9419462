// What the kernels are asked for: plain structures, no Torch. One table of functions per
// instruction set; bind.cpp picks one and supplies the threads.
#pragma once

#include <cstdint>

namespace fastood {

constexpr int64_t PANEL = 32;          // classes in a packed panel, [D padded][PANEL]
constexpr int64_t CHUNK = 16;          // the inner dimension is padded to this
constexpr int64_t SLICE = 32;          // and to this for the matrix unit
constexpr int64_t SPLIT_SLICE = 3 * PANEL * SLICE;  // numbers a panel has there in a slice
constexpr int64_t SPAN = 1024;         // most classes reduced at once: a multiple of PANEL
constexpr int MAX_TAUS = 16;

constexpr int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

enum class Type : int { kFloat, kBFloat16, kHalf };

// Rows of numbers: element (i, j) is data[i * stride + j].
struct Rows {
    const void* data;
    Type type;
    int64_t count, width, stride;
};

// Runs body(context, begin, end) over pieces of 0..n, on all threads.
struct Pool {
    int threads;
    void (*run)(int64_t n, void (*body)(void*, int64_t, int64_t), void* context);
};

enum class Score : int {
    kMaxSimilarity, kMaxLogit, kMaxSoftmax, kEnergy, kNegEntropy, kVariance, kMargin, kDeltaEnergy,
};

struct Request {
    Score score;
    int tau;       // which of the temperatures
    int64_t c;     // delta_energy: classes reset
    double reset;  // delta_energy
    bool flag;     // energy: unit; margin: of probabilities; delta_energy: joint
};

enum Fault : uint8_t { kFine = 0, kNotFinite = 1, kZero = 2, kOverflow = 3 };  // the last: of products

// One pass over rows of similarities. They are products of `image` with `panels`, or given.
struct RowJob {
    Rows image;                // (B, D), or unused
    bool normalize;            // divide image rows by their norm
    const float* panels;       // packed classes
    const uint16_t* split;     // or packed for the matrix unit, or neither: then
    Rows similarity;           // (B, K)
    int64_t K;
    int64_t c;                 // top values kept, <= K
    int T;
    const double* taus;
    bool moments;              // neg_entropy and variance are wanted
    float* values;             // (B, c) or null
    int64_t* index;            // (B, c) or null
    double* rest;              // (B, T) or null: log sum over all but the top c, relative to values[0]
    float* neg_entropy;        // (B, T) or null
    float* variance;           // (B, T) or null
    const Request* requests;
    int64_t R;
    float* scores;             // (R, B) or null
    uint8_t* faults;           // (B,)
};

// The gradient of anything computed from row statistics. With E = exp((s - shift) / tau) and
// d = (s - best) / tau, dL/ds_k = sum_t E_k (a_t + b_t d_k + g_t E_k); for the top c classes it is
// `tops` instead. The caller chooses the shift so that E is at most about 1 outside of those.
struct RowBackwardJob {
    Rows image;                // (B, D) float32, as multiplied
    const float* panels;       // packed classes; null if similarities were given
    const float* columns;      // the classes spread in panels of columns, for d_image
    Rows similarity;
    int64_t K, c;
    int T;
    const double* taus;
    const float* best;         // (B,)
    const float* shift;        // (B, T)
    const float* coefficients; // (B, T, 3): a, b, g
    const int64_t* index;      // (B, c)
    const float* tops;         // (B, c)
    float* d_image;            // (B, width) or null; width = D padded to PANEL
    float* d_text;             // (K, width), zeros to start with, or null
    float* d_similarity;       // (B, K) or null
};

struct GroupedJob;          // grouped_job.h
struct GroupedBackwardJob;
struct PatchJob;            // patch_job.h
struct PatchTermsJob;       // patch_terms_job.h
struct EbmJob;              // ebm_job.h

struct Kernels {
    const char* name;
    bool (*supported)();
    // rows first..first+count as float32 of unit norm
    void (*unit)(const Rows& rows, int64_t first, int64_t count, float* out, uint8_t* faults);
    // classes first..first+count of (K, D), first a multiple of PANEL, into their panels
    void (*pack)(const Rows& text, bool normalize, int64_t first, int64_t count, float* panels,
                 uint8_t* faults);
    // The same for the matrix unit, three bfloat16 numbers for each; null without one
    void (*split)(const Rows& text, bool normalize, int64_t first, int64_t count,
                  uint16_t* panels, uint8_t* faults);
    // (K, D) to panels of columns, [D padded / PANEL][K padded to CHUNK][PANEL]
    void (*spread)(const float* text, int64_t stride, int64_t K, int64_t D, float* columns);
    void (*rows)(const RowJob&, const Pool&);
    void (*rows_backward)(const RowBackwardJob&, const Pool&);
    void (*grouped)(const GroupedJob&, const Pool&);
    void (*grouped_backward)(const GroupedBackwardJob&, const Pool&);
    void (*patches)(const PatchJob&, const Pool&);
    void (*patch_terms)(const PatchTermsJob&, const Pool&);
    void (*ebm)(const EbmJob&, const Pool&);
};

extern const Kernels kernels_generic;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_amx;

// Memory of the calling thread, kept between calls; at least n floats, aligned to 64 bytes.
// `slot` tells apart what is in use at the same time.
float* scratch(int slot, int64_t n);

}  // namespace fastood
