// Bringing what users have into the layout the multiply wants: float32, unit rows, padded.
#pragma once

static inline float half_to_float(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
    uint32_t bits = h & 0x7fff;
    if (bits >= 0x7c00) {
        bits = (bits << 13) | 0x7f800000u;  // Inf and NaN
    } else if (bits >= 0x0400) {
        bits = (bits << 13) + (112u << 23);
    } else {  // subnormal: scale an integer
        const float f = static_cast<float>(bits) * 5.9604644775390625e-8f;
        std::memcpy(&bits, &f, 4);
    }
    bits |= sign;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

// n numbers of row i as float32, then zeros up to `padded`.
static void read_row(const Rows& rows, int64_t i, int64_t from, int64_t n, int64_t padded,
                     float* out) {
    const int64_t start = i * rows.stride + from;
    if (rows.type == Type::kFloat) {
        std::memcpy(out, static_cast<const float*>(rows.data) + start,
                    static_cast<size_t>(n) * sizeof(float));
    } else if (rows.type == Type::kBFloat16) {
        const uint16_t* in = static_cast<const uint16_t*>(rows.data) + start;
        uint32_t* bits = reinterpret_cast<uint32_t*>(out);
        for (int64_t k = 0; k < n; ++k) bits[k] = static_cast<uint32_t>(in[k]) << 16;
    } else {
        const uint16_t* in = static_cast<const uint16_t*>(rows.data) + start;
        int64_t k = 0;
#if FASTOOD_WIDTH == 16
        for (; k + 16 <= n; k += 16)
            store(out + k, _mm512_cvtph_ps(_mm256_loadu_si256(
                               reinterpret_cast<const __m256i*>(in + k))));
#elif FASTOOD_WIDTH == 8
        for (; k + 8 <= n; k += 8)
            store(out + k,
                  _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + k))));
#endif
        for (; k < n; ++k) out[k] = half_to_float(in[k]);
    }
    for (int64_t k = n; k < padded; ++k) out[k] = 0.0f;
}

static inline float sum_of_squares(const float* x, int64_t padded) {
    vf s[2] = {vf{}, vf{}};
    int64_t k = 0;
    for (; k + 2 * W <= padded; k += 2 * W)
        for (int v = 0; v < 2; ++v) {
            const vf a = load(x + k + v * W);
            s[v] = fma(a, a, s[v]);
        }
    for (; k < padded; k += W) {
        const vf a = load(x + k);
        s[0] = fma(a, a, s[0]);
    }
    return sum(s[0] + s[1]);
}

static inline void scale_row(float* x, int64_t padded, float by) {
    for (int64_t k = 0; k < padded; k += W) store(x + k, load(x + k) * all(by));
}

// Checks a row (padded with zeros) and gives it unit norm if asked.
static Fault prepare_row(float* x, int64_t padded, bool normalize) {
    float squares = sum_of_squares(x, padded);
    // squares of 1e20 overflow and of 1e-25 vanish; ordinary rows are left alone
    if (!(squares > 1e-30f && squares < 1e30f)) {
        vf most = vf{}, odd = vf{};
        for (int64_t k = 0; k < padded; k += W) {
            const vf a = load(x + k);
            odd = odd + (a - a);  // NaN if anything is not finite
            most = larger(most, larger(a, -a));
        }
        const float largest_element = largest(most);
        const float finite = sum(odd);
        if (!(finite == 0.0f)) return kNotFinite;
        if (largest_element == 0.0f) return kZero;
        if (!normalize) return kFine;
        for (int64_t k = 0; k < padded; k += W) store(x + k, load(x + k) / all(largest_element));
        squares = sum_of_squares(x, padded);
    }
    if (normalize) scale_row(x, padded, 1.0f / __builtin_sqrtf(squares));
    return kFine;
}

// Rows first..first+rows of `image`, checked, normalised and packed for `tile`.
static Packed pack_rows(const Rows& image, int64_t first, int64_t rows, bool normalize,
                        float* packed, uint8_t* faults) {
    const int64_t inner = round_up(image.width, CHUNK);
    float* row = scratch(1, inner);
    for (int64_t i = 0; i < rows; ++i) {
        read_row(image, first + i, 0, image.width, inner, row);
        if (faults != nullptr) {
            faults[first + i] = prepare_row(row, inner, normalize);
            // a row that is reported in the end must not slow the others down with NaN or Inf
            if (faults[first + i] != kFine) std::memset(row, 0, sizeof(float) * inner);
        }
        pack_row(row, i, rows, inner, packed);
    }
    return {packed, rows, inner};
}

// out[i][j] = rows[j][i] for CHUNK numbers of PANEL rows
static inline void transpose_strip(const float* rows, int64_t stride, float* out) {
#if FASTOOD_WIDTH >= 8
    for (int64_t j = 0; j < PANEL; j += 4, rows += 4 * stride)
        for (int64_t i = 0; i < CHUNK; i += 4) {
            __m128 a = _mm_loadu_ps(rows + i), b = _mm_loadu_ps(rows + stride + i),
                   c = _mm_loadu_ps(rows + 2 * stride + i), d = _mm_loadu_ps(rows + 3 * stride + i);
            _MM_TRANSPOSE4_PS(a, b, c, d);
            float* to = out + i * PANEL + j;
            _mm_storeu_ps(to, a);
            _mm_storeu_ps(to + PANEL, b);
            _mm_storeu_ps(to + 2 * PANEL, c);
            _mm_storeu_ps(to + 3 * PANEL, d);
        }
#else
    for (int64_t j = 0; j < PANEL; ++j)
        for (int64_t i = 0; i < CHUNK; ++i) out[i * PANEL + j] = rows[j * stride + i];
#endif
}

// Rows first..first+count of `text` (K, D), first a multiple of PANEL: checked, normalised and
// packed into panels [K / PANEL][D padded][PANEL] with zeros around. faults may be null.
static void pack_classes(const Rows& text, bool normalize, int64_t first, int64_t count,
                         float* panels, uint8_t* faults) {
    const int64_t inner = round_up(text.width, CHUNK);
    float* rows = scratch(1, PANEL * inner);
    for (int64_t k = first; k < first + count; k += PANEL) {
        const int64_t n = first + count - k < PANEL ? first + count - k : PANEL;
        for (int64_t j = 0; j < n; ++j) {
            float* row = rows + j * inner;
            read_row(text, k + j, 0, text.width, inner, row);
            if (faults != nullptr) faults[k + j] = prepare_row(row, inner, normalize);
        }
        std::memset(rows + n * inner, 0, sizeof(float) * (PANEL - n) * inner);
        float* panel = panels + k * inner;
        for (int64_t d = 0; d < inner; d += CHUNK)  // a strip at a time stays in L1
            transpose_strip(rows + d, inner, panel + d * PANEL);
    }
}

// One row of floats (padded with zeros to `width`, a multiple of PANEL) as row `index` of panels of
// columns, each [rows of the panel][PANEL]: the right factor of a gradient.
static inline void spread_row(const float* row, int64_t index, int64_t width, int64_t panel_stride,
                              float* panels) {
    for (int64_t k = 0; k < width; k += PANEL, panels += panel_stride)
        std::memcpy(panels + index * PANEL, row + k, sizeof(float) * PANEL);
}

static void spread_classes(const float* text, int64_t stride, int64_t K, int64_t D,
                           float* columns) {
    const int64_t width = round_up(D, PANEL), height = round_up(K, CHUNK);
    float* row = scratch(1, width);
    for (int64_t k = 0; k < height; ++k) {
        std::memset(row, 0, sizeof(float) * width);
        if (k < K) std::memcpy(row, text + k * stride, sizeof(float) * D);
        spread_row(row, k, width, height * PANEL, columns);
    }
}

// Rows first..first+count as float32 of unit norm, (count of all, width).
static void unit_rows(const Rows& rows, int64_t first, int64_t count, float* out,
                      uint8_t* faults) {
    const int64_t padded = round_up(rows.width, CHUNK);
    float* row = scratch(1, padded);
    for (int64_t i = first; i < first + count; ++i) {
        read_row(rows, i, 0, rows.width, padded, row);
        faults[i] = prepare_row(row, padded, true);
        std::memcpy(out + i * rows.width, row, sizeof(float) * rows.width);
    }
}
